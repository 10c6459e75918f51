// What every C++ kernel shares: its arguments, vectors of 16 floats, and the arithmetic the ops need.
//
// A kernel file defines DSV4C_KERNEL { ... } once; SYMBOL and its constants are defined in front of it. Arguments are
// tensors (row 0 dimension may be strided, the rest is dense) or None. The vectors are GCC's, so one text serves
// AVX-512, AVX2 and plain targets. No result depends on how many rows a call has: every sum has a fixed order.
#pragma once
#include <tvm/ffi/c_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
constexpr int64_t VL = 16;

struct bf16 {
  uint16_t bits;
};

inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }
// where the first is NaN, so is the result
inline vf max(vf a, vf b) { return a < b ? b : a; }
inline vf min(vf a, vf b) { return a > b ? b : a; }
inline vf lanes() { return vf{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline float sum(vf v) {
  float a[VL];
  store(a, v);
  for (int n = VL / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
}
inline float maximum(vf v) {
  float a[VL];
  store(a, v);
  for (int n = VL / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
  return a[0];
}

// e^x to 1 ulp or so: 2^n * p(r), x = n ln 2 + r, p the degree-6 minimax polynomial of Cephes; 0 below -87.3.
inline vf exp(vf x) {
  vf low = splat(-87.3f);
  vf y = min(splat(88.3f), max(low, x));  // a number whatever x is
  vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf n = (y * 1.44269504088896341f + magic) - magic;
  vf r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
  vf e = p * (vf)scale;
  e = x < low ? vf{} : e;
  return x != x ? x : e;
}
inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
inline vf swiglu(vf gate, vf up, float limit) {
  gate = min(gate, splat(limit));
  up = min(max(up, splat(-limit)), splat(limit));
  return gate * sigmoid(gate) * up;
}

struct Tensor {
  const DLTensor* t;
  explicit operator bool() const { return t != nullptr; }
  int64_t size(int i) const { return t->shape[i]; }
  // Elements between neighbours of dimension 0.
  int64_t step() const {
    if (t->strides) return t->strides[0];
    int64_t n = 1;
    for (int i = 1; i < t->ndim; ++i) n *= t->shape[i];
    return n;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < t->ndim; ++i) n *= t->shape[i];
    return n;
  }
  template <class T = float>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(t->data) + t->byte_offset);
  }
  template <class T = float>
  T* row(int64_t i) const {
    return data<T>() + i * step();
  }
};

struct Args {
  const TVMFFIAny* args;
  int32_t count;
  void expect(int n) const {
    if (n != count) throw std::runtime_error("wrong number of arguments");
  }
  Tensor operator[](int i) const {
    const TVMFFIAny& a = args[i];
    if (a.type_index == kTVMFFITensor) return {TVMFFITensorGetDLTensorPtr(a.v_obj)};
    if (a.type_index == kTVMFFIDLTensorPtr) return {static_cast<const DLTensor*>(a.v_ptr)};
    if (a.type_index == kTVMFFINone) return {nullptr};
    throw std::runtime_error("an argument is no tensor");
  }
};

void kernel(const Args& a);

}  // namespace

#define DSV4C_JOIN2(a, b) a##b
#define DSV4C_JOIN(a, b) DSV4C_JOIN2(a, b)
extern "C" __attribute__((visibility("default"))) int DSV4C_JOIN(__tvm_ffi_, SYMBOL)(
    void*, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  result->type_index = kTVMFFINone;
  result->zero_padding = 0;
  result->v_int64 = 0;
  try {
    kernel(Args{args, count});
    return 0;
  } catch (const std::exception& e) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", e.what());
    return -1;
  }
}
#define DSV4C_KERNEL \
  namespace {        \
  void kernel(const Args& a)
#define DSV4C_END }
