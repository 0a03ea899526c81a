// Operators of the simulated device. See sim.h.
//
// There is one kernel for nearly everything: it hands the CPU kernel host views of the device tensors, over the same
// bytes, and turns what comes back into device tensors. It is not a fall-back of the project under test: it plays the
// device. Which operators a real device would have to hand to its host is decided from the names it counts.
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <set>

namespace sim {

bool on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kType;
}

namespace {

void free_host_view(void* context) {
  delete static_cast<c10::Storage*>(context);
}

at::Tensor tensor_over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

bool waits_for_values(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::_local_scalar_dense", "aten::equal",         "aten::nonzero",           "aten::masked_select",
      "aten::_unique2",            "aten::unique_dim",    "aten::unique_consecutive", "aten::bincount",
      "aten::is_nonzero",          "aten::_linalg_check_errors"};
  return names.count(name.substr(0, name.find('.'))) > 0;
}

void hash_in(size_t& seed, size_t value) {
  seed ^= value + 0x9e3779b97f4a7c15ULL + (seed << 6) + (seed >> 2);
}

void hash_tensor(size_t& seed, const at::Tensor& tensor) {
  if (!tensor.defined()) return hash_in(seed, 0);
  hash_in(seed, static_cast<size_t>(tensor.scalar_type()) + 1);
  for (auto size : tensor.sizes()) hash_in(seed, static_cast<size_t>(size));
}

// Shapes, dtypes and scalars: what a compiler of single operators would have to compile anew for.
void hash_argument(size_t& seed, const c10::IValue& value) {
  if (value.isTensor()) {
    hash_tensor(seed, value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorList()) hash_tensor(seed, tensor);
  } else if (value.isInt()) {
    hash_in(seed, static_cast<size_t>(value.toInt()));
  } else if (value.isDouble()) {
    hash_in(seed, std::hash<double>()(value.toDouble()));
  } else if (value.isBool()) {
    hash_in(seed, value.toBool() ? 2 : 1);
  } else if (value.isIntList()) {
    for (int64_t item : value.toIntList()) hash_in(seed, static_cast<size_t>(item));
  }
}

size_t signature_of(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  size_t signature = std::hash<std::string>()(name);
  for (const auto& argument : arguments) hash_argument(signature, argument);
  return signature;
}

void count_kernel(const std::string& name, size_t signature) {
  auto& count = counters();
  std::lock_guard<std::mutex> lock(count.mutex);
  ++count.kernels[name];
  if (waits_for_values(name)) ++count.host_reads[name];
  count.signatures.insert(signature);
}

// The device tensors of one call and their host views, in both directions.
class Call {
 public:
  explicit Call(const std::string& name) : name_(name) {}

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!on_device(tensor)) {
      refuse_host_tensor(tensor);
      return tensor;
    }
    TORCH_CHECK(!device_ || *device_ == tensor.device(), "Expected all tensors to be on the same device, but found at ",
                "least two devices, ", device_ ? *device_ : tensor.device(), " and ", tensor.device(), "! (", name_, ")");
    device_ = tensor.device();
    refuse_mixture();
    for (auto& [device, host] : pairs_)
      if (device.is_same(tensor)) return host;
    pairs_.emplace_back(tensor, host_alias(tensor));
    return pairs_.back().second;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || on_device(tensor)) return tensor;
    for (auto& [device, host] : pairs_) {
      if (host.is_same(tensor)) return device;
      if (tensor.has_storage() && host.storage().is_alias_of(tensor.storage()))
        return tensor_over(device.storage(), kKey, tensor);
    }
    return adopt(tensor, device().index());
  }

  // An out= argument may have been resized, which gave its host view bytes of its own.
  void take_over_resized() {
    for (auto& [device, host] : pairs_) {
      if (host.sizes() != device.sizes() || host.strides() != device.strides()) {
        if (host.storage().nbytes() > device.storage().nbytes())
          device.unsafeGetTensorImpl()->set_storage_keep_dtype(adopt_storage(host.storage(), device.device().index()));
        device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      }
    }
  }

  c10::Device device() const {
    return device_ ? *device_ : current_device();
  }
  void set_device(c10::Device device) {
    device_ = device.has_index() ? device : current_device();
  }

 private:
  void refuse_host_tensor(const at::Tensor& tensor) {
    if (tensor.dim() == 0 || host_seen_) return; // 0-dimensional host tensors pass for scalars
    host_seen_ = tensor.device();
    refuse_mixture();
  }
  void refuse_mixture() const {
    TORCH_CHECK(!host_seen_ || !device_, "Expected all tensors to be on the same device, but found at least two ",
                "devices, ", device_.value_or(current_device()), " and ", host_seen_.value_or(at::kCPU), "! (", name_, ")");
  }

  const std::string& name_;
  std::optional<c10::Device> device_, host_seen_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
};

c10::IValue convert(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> result;
    for (const at::Tensor& tensor : value.toTensorList()) result.push_back(map(tensor));
    return result;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> result;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
      result.push_back(tensor ? std::optional<at::Tensor>(map(*tensor)) : std::nullopt);
    return result;
  }
  return value;
}

// CPU kernels that draw from the default CPU generator without being asked draw from the device's meanwhile.
class DefaultGeneratorSwap {
 public:
  DefaultGeneratorSwap(bool wanted, c10::DeviceIndex index) : wanted_(wanted) {
    if (wanted_) exchange(index);
  }
  void put_back(c10::DeviceIndex index) {
    if (wanted_) exchange(index);
    wanted_ = false;
  }

 private:
  static void exchange(c10::DeviceIndex index) {
    auto host = at::detail::getDefaultCPUGenerator(), device = host_generator(index);
    auto host_state = host.get_state(), device_state = device.get_state();
    host.set_state(device_state);
    device.set_state(host_state);
  }
  bool wanted_;
};

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = c10::toString(op.operator_name());
  const auto count = schema.arguments().size();
  const auto signature = signature_of(name, torch::jit::last(*stack, count));
  Call call(name);
  bool takes_generator = false;
  for (size_t i = 0; i < count; ++i) {
    auto& value = torch::jit::peek(*stack, i, count);
    const auto& type = *schema.arguments()[i].type();
    if (value.isDevice() && value.toDevice().type() == kType) {
      call.set_device(value.toDevice());
      value = at::Device(at::kCPU);
    } else if (value.isGenerator()) {
      takes_generator = true;
      auto generator = value.toGenerator();
      if (generator.device().type() == kType) value = inner_generator(generator);
    } else if (type.kind() == c10::TypeKind::OptionalType &&
               type.castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType) {
      takes_generator = true; // None: filled in below, when the device is known
    } else {
      value = convert(value, [&call](const at::Tensor& tensor) { return call.to_host(tensor); });
    }
  }
  const auto index = call.device().index();
  for (size_t i = 0; takes_generator && i < count; ++i) {
    auto& value = torch::jit::peek(*stack, i, count);
    if (value.isNone() && schema.arguments()[i].name() == "generator") value = host_generator(index);
  }
  {
    DefaultGeneratorSwap swap(!takes_generator && op.hasTag(at::Tag::nondeterministic_seeded), index);
    c10::impl::ExcludeDispatchKeyGuard below_autograd(c10::autograd_dispatch_keyset);
    op.callBoxed(stack);
    swap.put_back(index);
  }
  count_kernel(name, signature);
  call.take_over_resized();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto& value = torch::jit::peek(*stack, i, schema.returns().size());
    value = convert(value, [&call](const at::Tensor& tensor) { return call.to_device(tensor); });
  }
}

at::Tensor empty_memory_format(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                               std::optional<at::Device> device, std::optional<bool>,
                               std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device && device->has_index() ? *device : current_device());
  return at::detail::empty_generic(size, c10::GetAllocator(kType), c10::DispatchKeySet(kKey),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device && device->has_index() ? *device : current_device());
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(kType), c10::DispatchKeySet(kKey),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  auto& count = counters();
  {
    std::lock_guard<std::mutex> lock(count.mutex);
    if (!on_device(source)) {
      ++count.to_device;
      count.to_device_bytes += static_cast<int64_t>(target.nbytes());
    } else if (!on_device(target)) {
      ++count.to_host;
      count.to_host_bytes += static_cast<int64_t>(target.nbytes());
    } else {
      ++count.kernels["aten::copy_"];
    }
  }
  auto host_target = on_device(target) ? host_alias(target) : target;
  host_target.copy_(on_device(source) ? host_alias(source) : source);
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  const_cast<at::Tensor&>(target).resize_(source.sizes());
  return copy_from(source, target, false);
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  auto needed = static_cast<size_t>((impl->storage_offset() + impl->numel())) * self.itemsize();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (needed > storage->nbytes()) {
    c10::DeviceGuard guard(self.device());
    auto data = c10::GetAllocator(kType)->allocate(needed);
    std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(needed);
  }
  return self;
}

at::Tensor& set_from(at::Tensor& self, const c10::Storage& storage, int64_t offset, c10::IntArrayRef size,
                     c10::IntArrayRef stride) {
  TORCH_CHECK(storage.device().type() == kType, "set_: the storage is on ", storage.device(), ", the tensor on ",
              self.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  if (stride.empty()) {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& set_storage_all(at::Tensor& self, c10::Storage storage) {
  auto length = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_from(self, storage, 0, {length}, {});
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage storage, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  return set_from(self, storage, offset, size, stride);
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_from(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_tensor(self, at::empty({0}, self.options()));
}

void record_stream(at::Tensor&, c10::Stream) {}

std::map<std::string, py::object> snapshot() {
  auto& count = counters();
  std::lock_guard<std::mutex> lock(count.mutex);
  return {{"kernels", py::cast(count.kernels)},
          {"host_reads", py::cast(count.host_reads)},
          {"collectives", py::cast(count.collectives)},
          {"events", py::cast(count.events)},
          {"to_device", py::cast(count.to_device)},
          {"to_device_bytes", py::cast(count.to_device_bytes)},
          {"to_host", py::cast(count.to_host)},
          {"to_host_bytes", py::cast(count.to_host_bytes)},
          {"signatures", py::cast(count.signatures.size())}};
}

void reset(bool signatures) {
  auto& count = counters();
  std::lock_guard<std::mutex> lock(count.mutex);
  count.kernels.clear();
  count.host_reads.clear();
  count.collectives.clear();
  count.events.clear();
  count.to_device = count.to_device_bytes = count.to_host = count.to_host_bytes = 0;
  if (signatures) count.signatures.clear();
}

TORCH_LIBRARY_IMPL(_, SIM_KEY, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>());
}

TORCH_LIBRARY_IMPL(aten, SIM_KEY, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize_);
  m.impl("set_", &set_nothing);
  m.impl("set_.source_Storage", &set_storage_all);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("record_stream", &record_stream);
}

} // namespace

at::Tensor host_alias(const at::Tensor& tensor) {
  auto* owner = new c10::Storage(tensor.storage()); // keeps the device's bytes alive
  void* address = tensor.storage().unsafeGetStorageImpl()->data_ptr().get();
  c10::DataPtr bytes(address, owner, &free_host_view, c10::Device(at::kCPU));
  c10::Storage view(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(bytes),
                    c10::GetCPUAllocator(), /*resizable=*/true);
  return tensor_over(std::move(view), c10::DispatchKey::CPU, tensor);
}

at::Tensor adopt(const at::Tensor& host, c10::DeviceIndex index) {
  TORCH_CHECK(host.layout() == at::kStrided, "the simulated device has dense tensors only, not ", host.layout());
  return tensor_over(adopt_storage(host.storage(), index), kKey, host);
}

void bind_kernels(py::module_& m) {
  m.def("counters", &snapshot);
  m.def("reset_counters", &reset, py::arg("signatures") = false);
  m.def("count_event", [](const std::string& name) {
    std::lock_guard<std::mutex> lock(counters().mutex);
    ++counters().events[name];
  });
}

} // namespace sim
