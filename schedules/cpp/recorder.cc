// A CUDA driver that launches nothing and writes down what it is asked to: built as libcuda.so.1 for dsv4c/replay.py.
//
// A tensor map is its own arguments (below), so that they are found again among the parameters of a launch. Parameters
// are copied as a driver copies them: as many bytes of each, to such a place, as the machine code says.

#include <cuda.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Map {
  uint64_t address;
  int32_t dtype, rank;
  uint64_t sizes[5], strides[4];
  uint32_t box[5];
  int8_t swizzle, promotion, fill, interleave;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "a tensor map holds its own arguments");

struct Layout {
  std::vector<int64_t> offsets, sizes;
  int64_t bytes;
};

struct Launched {
  char symbol[128];
  int32_t grid[3], block[3], cluster[3];
  int32_t shared, allowed, pdl, parameters;
  unsigned char bank[4096];
};

struct Function {
  std::string symbol;
  int allowed = 48 * 1024;  // bytes of shared memory that a launch may ask for
};

static Layout layout;
static std::vector<Launched> launches;

EXPORT void recorder_layout(int count, const int64_t* offsets, const int64_t* sizes, int64_t bytes) {
  layout = {{offsets, offsets + count}, {sizes, sizes + count}, bytes};
}

EXPORT int recorder_take(Launched* out) {
  if (launches.empty()) return 0;
  *out = launches.front();
  launches.erase(launches.begin());
  return 1;
}

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

EXPORT CUresult cuGetErrorName(CUresult, const char** name) {
  *name = "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*,
                                  void**, unsigned) {
  *library = reinterpret_cast<CUlibrary>(new char);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryUnload(CUlibrary library) {
  delete reinterpret_cast<char*>(library);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) {
  *kernel = reinterpret_cast<CUkernel>(new Function{name});
  return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) reinterpret_cast<Function*>(kernel)->allowed = value;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType dtype, cuuint32_t rank, void* address,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t*, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  Map map{};
  map.address = reinterpret_cast<uint64_t>(address), map.dtype = dtype, map.rank = int32_t(rank);
  map.swizzle = int8_t(swizzle), map.promotion = int8_t(promotion);
  map.fill = int8_t(fill), map.interleave = int8_t(interleave);
  std::memcpy(map.sizes, sizes, rank * sizeof *sizes);
  std::memcpy(map.strides, strides, (rank - 1) * sizeof *strides);
  std::memcpy(map.box, box, rank * sizeof *box);
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** values, void**) {
  const Function* one = reinterpret_cast<const Function*>(function);
  if (layout.bytes > int64_t(sizeof(Launched::bank))) return CUDA_ERROR_INVALID_VALUE;
  Launched out{};
  std::strncpy(out.symbol, one->symbol.c_str(), sizeof out.symbol - 1);
  out.grid[0] = int(config->gridDimX), out.grid[1] = int(config->gridDimY), out.grid[2] = int(config->gridDimZ);
  out.block[0] = int(config->blockDimX), out.block[1] = int(config->blockDimY), out.block[2] = int(config->blockDimZ);
  out.cluster[0] = out.cluster[1] = out.cluster[2] = 1;
  out.shared = int(config->sharedMemBytes), out.allowed = one->allowed;
  out.parameters = int(layout.offsets.size());
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      out.cluster[0] = int(attribute.value.clusterDim.x), out.cluster[1] = int(attribute.value.clusterDim.y);
      out.cluster[2] = int(attribute.value.clusterDim.z);
    } else if (attribute.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      out.pdl = attribute.value.programmaticStreamSerializationAllowed;
    }
  }
  for (size_t i = 0; i < layout.offsets.size(); ++i)
    std::memcpy(out.bank + layout.offsets[i], values[i], size_t(layout.sizes[i]));
  launches.push_back(out);
  return CUDA_SUCCESS;
}
