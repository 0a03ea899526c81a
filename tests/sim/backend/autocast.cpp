// torch.autocast on the simulated device: torch's own lists of operators. See sim.h.
#include "sim.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace at::autocast {

#define SIM_LOWER(...) KERNEL(sim::kType, __VA_ARGS__, lower_precision_fp)
#define SIM_FP32(...) KERNEL(sim::kType, __VA_ARGS__, fp32)
#define SIM_FP32_SET(...) KERNEL(sim::kType, __VA_ARGS__, fp32_set_opt_dtype)
#define SIM_PROMOTE(...) KERNEL(sim::kType, __VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(_, SIM_AUTOCAST, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, SIM_AUTOCAST, m) {
  AT_FORALL_LOWER_PRECISION_FP(SIM_LOWER)
  AT_FORALL_FP32(SIM_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(SIM_FP32_SET)
  AT_FORALL_PROMOTE(SIM_PROMOTE)
}

} // namespace at::autocast
