// The host side that Inductor's generated `run_impl` expects, reduced to what elementwise and reduction kernels use:
// tensors by data pointer and sizes, temporaries from the heap. Anything else it may call (a GEMM, a fallback op) is
// not here, so that such a kernel does not compile.
#pragma once
#include <memory>

#include "dsv4c.h"

namespace {

struct Handle {
  const DLTensor* tensor = nullptr;
  std::shared_ptr<char[]> owned;
  int itemsize = 0;
  int64_t offset = 0;
  int64_t* sizes() const { return tensor->shape; }
  void* data_ptr() const {
    if (owned) return owned.get() + offset * itemsize;
    return static_cast<char*>(tensor->data) + tensor->byte_offset + offset * (tensor->dtype.bits / 8);
  }
  void reset() { owned.reset(); }
};
using AtenTensorHandle = Handle;
using RAIIAtenTensorHandle = Handle;
using DeviceStreamType = void*;
using AOTIProxyExecutorHandle = void*;

constexpr int cached_torch_dtype_float32 = 4, cached_torch_dtype_int32 = 4, cached_torch_dtype_int64 = 8;
constexpr int cached_torch_dtype_float64 = 8, cached_torch_dtype_bfloat16 = 2, cached_torch_dtype_bool = 1;
constexpr int cached_torch_dtype_uint8 = 1, cached_torch_dtype_int8 = 1, cached_torch_device_type_cpu = 0;

inline int aoti_torch_empty_strided(
    int64_t n, const int64_t* sizes, const int64_t* strides, int itemsize, int, int, Handle* out) {
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (sizes[i] == 0) last = -1;
    if (last >= 0) last += (sizes[i] - 1) * strides[i];
  }
  out->owned = std::shared_ptr<char[]>(new char[(last + 1) * itemsize + 64]);
  out->itemsize = itemsize;
  return 0;
}
inline Handle reinterpret_tensor_wrapper(const Handle& of, int64_t, const int64_t*, const int64_t*, int64_t offset) {
  Handle view = of;
  view.offset += offset;
  return view;
}
inline Handle wrap_with_raii_handle_if_needed(Handle handle) { return handle; }
#define AOTI_TORCH_ERROR_CODE_CHECK(call) (call)

inline bool _check_aoti_runtime_check_inputs_env() { return false; }
#define assert_size_stride(...) (void)0
inline void __check_inputs_outputs(Handle*, Handle*) {}
inline std::vector<Handle> steal_from_raw_handles_to_raii_handles(Handle* handles, size_t n) {
  return std::vector<Handle>(handles, handles + n);
}

struct AOTInductorModelKernels {};
struct AOTInductorModel {
  int device_idx_ = 0;
  std::unique_ptr<AOTInductorModelKernels> kernels_ = std::make_unique<AOTInductorModelKernels>();
  void run_impl(Handle* input_handles, Handle* output_handles, DeviceStreamType, AOTIProxyExecutorHandle);
};

}  // namespace
