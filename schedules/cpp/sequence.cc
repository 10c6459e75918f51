// sequence([[kernel, argument, ...], ...]) -> a function that makes these calls in order: one call from Python runs
// a whole segment. Arguments are kept alive by it.
#include <tvm/ffi/tvm_ffi.h>

#include <vector>

namespace ffi = tvm::ffi;

namespace {

struct Bound {
  ffi::Function kernel;
  std::vector<ffi::Any> kept;
  std::vector<ffi::AnyView> args;
};

ffi::Function sequence(ffi::Array<ffi::Array<ffi::Any>> calls) {
  auto bound = std::make_shared<std::vector<Bound>>();
  for (const auto& call : calls) {
    Bound b{call[0].cast<ffi::Function>(), {}, {}};
    for (size_t i = 1; i < call.size(); ++i) b.kept.push_back(call[i]);
    for (const auto& any : b.kept) b.args.push_back(any);
    bound->push_back(std::move(b));
  }
  return ffi::Function::FromPacked([bound](const ffi::AnyView*, int32_t, ffi::Any*) {
    for (const Bound& b : *bound) {
      ffi::Any result;
      b.kernel.CallPacked(b.args.data(), static_cast<int32_t>(b.args.size()), &result);
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sequence, sequence);
