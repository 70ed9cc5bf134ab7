// Kernels of a CUDA program with the times they began and ended, nodes of graphs among them: a
// library that the driver loads beside it (CUDA_INJECTION64_PATH) and that writes a line a kernel,
// tab-separated: launch, begin and end in ns, stream, blocks, threads, name. See show.py.
#include <cstdio>
#include <cstdlib>
#include <cupti.h>

namespace {

FILE* out = nullptr;

void CUPTIAPI request(uint8_t** buffer, size_t* size, size_t* most_records) {
  *size = size_t{8} << 20;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
  *most_records = 0;
}

void CUPTIAPI complete(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    const auto* k = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
    std::fprintf(out, "%u\t%llu\t%llu\t%u\t%d\t%d\t%s\n", k->correlationId,
                 static_cast<unsigned long long>(k->start), static_cast<unsigned long long>(k->end),
                 k->streamId, k->gridX * k->gridY * k->gridZ, k->blockX, k->name);
  }
  std::free(buffer);
}

void finish() {
  cuptiActivityFlushAll(1);
  std::fclose(out);
}

}  // namespace

extern "C" int InitializeInjection() {
  const char* path = std::getenv("KERNEL_RECORDS");
  out = std::fopen(path != nullptr ? path : "kernels.tsv", "w");
  if (out == nullptr || cuptiActivityRegisterCallbacks(request, complete) != CUPTI_SUCCESS ||
      cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS) {
    std::fprintf(stderr, "records: kernels cannot be recorded here\n");
    return 0;
  }
  std::atexit(finish);
  return 1;
}
