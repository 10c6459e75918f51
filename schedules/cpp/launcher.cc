// Launches GPU kernels from prepared records: cubins in memory, packed arguments, one loop over a whole segment.
//
// The driver is opened when first used, so the library loads (and its functions can be listed) on a machine without
// one. Nothing here knows an op: what is launched, with which bytes and how many threads, comes from the manifest.
#include <cuda.h>
#include <dlfcn.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

struct Driver {
  CUresult (*Init)(unsigned);
  CUresult (*GetErrorName)(CUresult, const char**);
  CUresult (*LibraryLoadData)(CUlibrary*, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                              unsigned);
  CUresult (*LibraryUnload)(CUlibrary);
  CUresult (*LibraryGetKernel)(CUkernel*, CUlibrary, const char*);
  CUresult (*KernelSetAttribute)(CUfunction_attribute, int, CUkernel, CUdevice);
  CUresult (*LaunchKernelEx)(const CUlaunchConfig*, CUfunction, void**, void**);
  CUresult (*TensorMapEncodeTiled)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

  static const Driver& get() {
    static const Driver driver = open();
    return driver;
  }

 private:
  template <class F>
  static void find(void* library, F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) TVM_FFI_THROW(RuntimeError) << "the CUDA driver lacks " << name;
  }

  static Driver open() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) TVM_FFI_THROW(RuntimeError) << "no CUDA driver: " << dlerror();
    Driver d{};
    find(library, d.Init, "cuInit");
    find(library, d.GetErrorName, "cuGetErrorName");
    find(library, d.LibraryLoadData, "cuLibraryLoadData");
    find(library, d.LibraryUnload, "cuLibraryUnload");
    find(library, d.LibraryGetKernel, "cuLibraryGetKernel");
    find(library, d.KernelSetAttribute, "cuKernelSetAttribute");
    find(library, d.LaunchKernelEx, "cuLaunchKernelEx");
    find(library, d.TensorMapEncodeTiled, "cuTensorMapEncodeTiled");
    CUresult status = d.Init(0);
    if (status != CUDA_SUCCESS) TVM_FFI_THROW(RuntimeError) << "cuInit failed with status " << int(status);
    return d;
  }
};

void check(CUresult status, const std::string& what) {
  if (status == CUDA_SUCCESS) return;
  const char* name = nullptr;
  Driver::get().GetErrorName(status, &name);
  TVM_FFI_THROW(RuntimeError) << what << ": " << (name ? name : "unknown driver error");
}

// One kernel of one cubin, on one device. The driver copies the image.
struct Kernel {
  CUlibrary library{};
  CUkernel kernel{};
  std::string symbol;
  unsigned shared = 0;

  Kernel() = default;
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;
  ~Kernel() {
    if (library) Driver::get().LibraryUnload(library);  // a destructor has nobody to tell
  }
};

// A kernel with its grid and the bytes of all parameters, each in a slot of its own.
struct Launch {
  struct alignas(64) Slot {
    char bytes[128];
  };
  std::shared_ptr<Kernel> kernel;
  std::vector<Slot> slots;
  std::vector<void*> params;
  CUlaunchConfig config{};
  CUlaunchAttribute attributes[2];

  void operator()(int64_t stream) {
    config.hStream = reinterpret_cast<CUstream>(stream);
    check(Driver::get().LaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel->kernel), params.data(), nullptr),
          "launching " + kernel->symbol);
  }
};

std::shared_ptr<Launch> prepare(std::shared_ptr<Kernel> kernel, int64_t threads, const ffi::Array<int64_t>& grid,
                                const ffi::Array<int64_t>& cluster, bool pdl, const std::string& kinds,
                                const ffi::Array<ffi::Any>& values) {
  auto out = std::make_shared<Launch>();
  out->slots.resize(kinds.size());
  for (size_t i = 0; i < kinds.size(); ++i) {
    char* to = out->slots[i].bytes;
    out->params.push_back(to);
    if (kinds[i] == 'm') {
      auto bytes = values[i].cast<ffi::Bytes>();
      if (bytes.size() != sizeof(CUtensorMap)) TVM_FFI_THROW(ValueError) << "a tensor map of the wrong size";
      std::memcpy(to, bytes.data(), sizeof(CUtensorMap));
    } else if (kinds[i] == 'f') {
      float number = float(values[i].cast<double>());
      std::memcpy(to, &number, sizeof number);
    } else if (kinds[i] == 'i') {
      int32_t number = int32_t(values[i].cast<int64_t>());
      std::memcpy(to, &number, sizeof number);
    } else {
      int64_t number = values[i].cast<int64_t>();
      std::memcpy(to, &number, sizeof number);
    }
  }
  CUlaunchConfig& c = out->config;
  c.gridDimX = unsigned(grid[0]), c.gridDimY = unsigned(grid[1]), c.gridDimZ = unsigned(grid[2]);
  c.blockDimX = unsigned(threads), c.blockDimY = 1, c.blockDimZ = 1;
  c.sharedMemBytes = kernel->shared;
  c.attrs = out->attributes;
  if (cluster[0] * cluster[1] * cluster[2] > 1) {
    CUlaunchAttribute& a = out->attributes[c.numAttrs++];
    a.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    a.value.clusterDim.x = unsigned(cluster[0]), a.value.clusterDim.y = unsigned(cluster[1]);
    a.value.clusterDim.z = unsigned(cluster[2]);
  }
  if (pdl) {
    CUlaunchAttribute& a = out->attributes[c.numAttrs++];
    a.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    a.value.programmaticStreamSerializationAllowed = 1;
  }
  out->kernel = std::move(kernel);
  return out;
}

// load(image, symbol, shared bytes, blocks of a cluster, device) -> a function
//   (threads, grid[3], cluster[3], pdl, kinds, values) -> a function (stream) that launches.
// One letter of `kinds` for each value: p address, i int32, l int64, f float32, m tensor map bytes.
ffi::Function load(ffi::Bytes image, ffi::String symbol, int64_t shared, int64_t cluster_size, int64_t device) {
  auto kernel = std::make_shared<Kernel>();
  const Driver& driver = Driver::get();
  kernel->symbol = symbol;
  kernel->shared = unsigned(shared);
  check(driver.LibraryLoadData(&kernel->library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
        "loading " + kernel->symbol);
  check(driver.LibraryGetKernel(&kernel->kernel, kernel->library, kernel->symbol.c_str()),
        "finding " + kernel->symbol);
  if (shared > 48 * 1024)  // more than this must be asked for
    check(driver.KernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int(shared), kernel->kernel,
                                    CUdevice(device)),
          kernel->symbol + " with " + std::to_string(shared) + " bytes of shared memory");
  if (cluster_size > 8)  // the portable limit
    check(driver.KernelSetAttribute(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, kernel->kernel,
                                    CUdevice(device)),
          kernel->symbol + " with a cluster of " + std::to_string(cluster_size));
  return ffi::Function::FromTyped([kernel](int64_t threads, ffi::Array<int64_t> grid, ffi::Array<int64_t> cluster,
                                           bool pdl, ffi::String kinds, ffi::Array<ffi::Any> values) {
    auto launch = prepare(kernel, threads, grid, cluster, pdl, kinds, values);
    return ffi::Function::FromTyped([launch](int64_t stream) { (*launch)(stream); });
  });
}

// chain([launch, ...]) -> a function (stream) that makes them in order.
ffi::Function chain(ffi::Array<ffi::Function> launches) {
  return ffi::Function::FromTyped([launches](int64_t stream) {
    for (const ffi::Function& launch : launches) launch(stream);
  });
}

// Sizes, element strides and box are given outermost first, as tensors have them; the driver wants the reverse.
ffi::Bytes tensor_map(int64_t address, int64_t dtype, int64_t element_bytes, ffi::Array<int64_t> sizes,
                      ffi::Array<int64_t> strides, ffi::Array<int64_t> box, int64_t swizzle, bool fill_nan,
                      int64_t promotion) {
  alignas(64) CUtensorMap map;
  cuuint64_t size[5], stride[5];
  cuuint32_t tile[5], step[5] = {1, 1, 1, 1, 1};
  int rank = int(sizes.size());
  for (int i = 0; i < rank; ++i) {
    size[i] = cuuint64_t(sizes[rank - 1 - i]);
    tile[i] = cuuint32_t(box[rank - 1 - i]);
    if (i) stride[i - 1] = cuuint64_t(strides[rank - 1 - i] * element_bytes);
  }
  CUresult status = Driver::get().TensorMapEncodeTiled(
      &map, CUtensorMapDataType(dtype), cuuint32_t(rank), reinterpret_cast<void*>(address), size, stride, tile, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(swizzle), CUtensorMapL2promotion(promotion),
      fill_nan ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status, "making a tensor map of rank " + std::to_string(rank));
  return ffi::Bytes(reinterpret_cast<const char*>(&map), sizeof map);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load, load);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(chain, chain);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tensor_map, tensor_map);
