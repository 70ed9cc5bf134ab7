// Carries the precompiled header (ATen.h, custom_function.h, autograd.h) that the layers on
// LibTorch share.
