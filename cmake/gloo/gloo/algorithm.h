// See cmake/gloo/README.md: nothing of this header is mentioned.
#pragma once
