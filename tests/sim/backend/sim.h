// Simulated accelerator, for tests only. Not vendor software and no model of a vendor's speed, memory or numerics.
//
// A real torch device whose tensors own host memory but are not CPU tensors: mixing them with CPU tensors raises, and
// every transfer is counted. Compiled once for the dispatch key PrivateUse1 (devices "npu" and "neuron", by renaming)
// and once for HPU (device "hpu").
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKey.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <unordered_set>

#ifdef SIM_HPU
#define SIM_KEY HPU
#define SIM_AUTOCAST AutocastHPU
#else
#define SIM_KEY PrivateUse1
#define SIM_AUTOCAST AutocastPrivateUse1
#endif

namespace sim {

constexpr c10::DeviceType kType = c10::DeviceType::SIM_KEY;
constexpr c10::DispatchKey kKey = c10::DispatchKey::SIM_KEY;

// What happened on the device since the last reset.
struct Counters {
  std::mutex mutex;
  std::map<std::string, int64_t> kernels;     // operator -> calls that computed on device tensors
  std::map<std::string, int64_t> host_reads;  // operator -> calls after which the host must wait for a device value
  int64_t to_device = 0, to_device_bytes = 0; // copies of host tensors onto the device
  int64_t to_host = 0, to_host_bytes = 0;     // and back
  std::map<std::string, int64_t> collectives; // collective -> calls
  std::map<std::string, int64_t> events;      // what the faked vendor packages count, such as mark_step
  std::unordered_set<size_t> signatures;      // operator with shapes, dtypes and scalars: what a graph compiler compiles
};
Counters& counters();

// device.cpp
c10::Device current_device();
at::Generator host_generator(c10::DeviceIndex index);       // the generator whose numbers device `index` draws
at::Generator inner_generator(const at::Generator& device); // the one behind a device generator
c10::Storage adopt_storage(const c10::Storage& host, c10::DeviceIndex index);

// kernels.cpp: zero-copy views between the two kinds of tensors
bool on_device(const at::Tensor& tensor);
at::Tensor host_alias(const at::Tensor& device_tensor);
at::Tensor adopt(const at::Tensor& host_tensor, c10::DeviceIndex index);

} // namespace sim
