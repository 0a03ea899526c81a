// Memory, current device, streams, events and random numbers of the simulated device. See sim.h.
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <chrono>
#include <cstdlib>

namespace sim {

Counters& counters() {
  static Counters* instance = new Counters(); // never destroyed: autograd threads may outlive static destruction
  return *instance;
}

namespace {

constexpr int kMaxDevices = 16;
thread_local c10::DeviceIndex current_index = 0;
thread_local c10::StreamId current_stream[kMaxDevices] = {};
std::atomic<c10::StreamId> next_stream{1};

int device_count() {
#ifdef SIM_HPU
  return 1; // a Gaudi process opens one card and calls it index 0
#else
  static const int count = [] {
    const char* text = std::getenv("SIM_DEVICE_COUNT");
    return text ? std::atoi(text) : 8;
  }();
  return count;
#endif
}

struct Memory {
  std::atomic<int64_t> allocated{0}, peak{0}, reserved{0}, peak_reserved{0};
  void add(int64_t bytes) {
    int64_t now = allocated += bytes;
    raise(peak, now);
    raise(reserved, now); // a caching allocator keeps what it once had
    raise(peak_reserved, reserved);
  }
  static void raise(std::atomic<int64_t>& mark, int64_t value) {
    for (int64_t seen = mark; seen < value && !mark.compare_exchange_weak(seen, value);) {
    }
  }
};

Memory& memory(c10::DeviceIndex index) {
  static Memory* all = new Memory[kMaxDevices];
  return all[index];
}

// Owner of a block of device memory: its own bytes, or a host storage whose bytes became device memory.
struct Block {
  c10::DataPtr bytes;
  c10::Storage adopted;
  int64_t size;
  c10::DeviceIndex index;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  memory(block->index).allocated -= block->size;
  delete block;
}

c10::DataPtr own(Block* block, void* address) {
  memory(block->index).add(block->size);
  return {address, block, &free_block, c10::Device(kType, block->index)};
}

struct SimAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* block = new Block{c10::GetCPUAllocator()->allocate(size), c10::Storage(), int64_t(size), current_index};
    return own(block, block->bytes.get());
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_block;
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};
SimAllocator allocator;
struct RegisterAllocator {
  RegisterAllocator() {
    c10::SetAllocator(kType, &allocator, /*priority=*/1);
  }
} register_allocator;

struct Moment {
  std::chrono::steady_clock::time_point at;
};

// Work is done when it is called, so every stream is always idle; streams differ by number only.
struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kType;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto old = getDevice();
    setDevice(device);
    return old;
  }
  c10::Device getDevice() const override {
    return {kType, current_index};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() >= -1 && device.index() < device_count(), "invalid device ordinal: ", device, ", ",
                device_count(), " simulated devices");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_index = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    auto index = device.index() < 0 ? current_index : device.index();
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index), current_stream[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    auto index = device.index() < 0 ? current_index : device.index();
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kType, index));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    auto index = device.index() < 0 ? current_index : device.index();
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index), next_stream++);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto old = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return old;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(device_count());
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Moment();
    static_cast<Moment*>(*event)->at = std::chrono::steady_clock::now();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Moment*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    auto span = static_cast<Moment*>(second)->at - static_cast<Moment*>(first)->at;
    return std::chrono::duration<double, std::milli>(span).count();
  }
};
C10_REGISTER_GUARD_IMPL(SIM_KEY, SimGuard)

// A device generator draws the numbers of a CPU generator of its own.
struct SimGenerator final : c10::GeneratorImpl {
  explicit SimGenerator(c10::DeviceIndex index, at::Generator inner)
      : c10::GeneratorImpl(c10::Device(kType, index), c10::DispatchKeySet(kKey)), inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override {
    inner.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    inner.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return inner.get_offset();
  }
  uint64_t current_seed() const override {
    return inner.current_seed();
  }
  uint64_t seed() override {
    return inner.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  SimGenerator* clone_impl() const override {
    return new SimGenerator(device_.index(), inner.clone());
  }
  at::Generator inner;
};

at::Generator make_generator(c10::DeviceIndex index) {
  return at::make_generator<SimGenerator>(index < 0 ? current_index : index, at::detail::createCPUGenerator());
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static auto* all = [] {
    auto* generators = new std::vector<at::Generator>();
    for (int i = 0; i < kMaxDevices; ++i) generators->push_back(make_generator(static_cast<c10::DeviceIndex>(i)));
    return generators;
  }();
  return (*all)[index < 0 ? current_index : index];
}

#ifdef SIM_HPU
using HooksBase = at::HPUHooksInterface;
#else
using HooksBase = at::PrivateUse1HooksInterface;
#endif

struct SimHooks final : HooksBase {
#ifdef SIM_HPU
  explicit SimHooks(at::HPUHooksArgs) {}
  bool hasHPU() const override {
    return true;
  }
#else
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    auto data = allocator.allocate(size);
    std::memcpy(data.get(), impl->data(), std::min(size, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(size);
  }
#endif
  void init() const override {}
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(device_count());
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    SimGuard().setDevice(c10::Device(kType, index));
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_index;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    auto old = current_index;
    setCurrentDevice(index);
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return make_generator(index);
  }
  bool isPinnedPtr(const void*) const override {
    return false;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetCPUAllocator();
  }
  at::Device getDeviceFromPtr(void*) const override {
    return {kType, current_index};
  }
};

#ifndef SIM_HPU
struct RegisterHooks {
  RegisterHooks() {
    at::RegisterPrivateUse1HooksInterface(new SimHooks());
  }
} register_hooks;
#endif

} // namespace

c10::Device current_device() {
  return {kType, current_index};
}

at::Generator inner_generator(const at::Generator& generator) {
  return static_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

at::Generator host_generator(c10::DeviceIndex index) {
  return inner_generator(default_generator(index));
}

c10::Storage adopt_storage(const c10::Storage& host, c10::DeviceIndex index) {
  auto* block = new Block{c10::DataPtr(), host, int64_t(host.nbytes()), index};
  void* address = host.unsafeGetStorageImpl()->data_ptr().get();
  return c10::Storage(c10::Storage::use_byte_size_t(), host.nbytes(), own(block, address), &allocator, true);
}

void bind_device(py::module_& m) {
  m.def("device_count", &device_count);
  m.def("current_device", [] { return static_cast<int>(current_index); });
  m.def("set_device", [](int index) { SimGuard().setDevice(c10::Device(kType, static_cast<c10::DeviceIndex>(index))); });
  m.def("default_generator", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  m.def("memory", [](int index) {
    auto& stats = memory(static_cast<c10::DeviceIndex>(index));
    return std::map<std::string, int64_t>{{"allocated", stats.allocated},
                                          {"peak", stats.peak},
                                          {"reserved", stats.reserved},
                                          {"peak_reserved", stats.peak_reserved}};
  });
  m.def("reset_peak", [](int index) {
    auto& stats = memory(static_cast<c10::DeviceIndex>(index));
    stats.peak = stats.allocated.load();
    stats.peak_reserved = stats.reserved.load();
  });
  m.def("empty_cache", [](int index) {
    auto& stats = memory(static_cast<c10::DeviceIndex>(index));
    stats.reserved = stats.allocated.load();
  });
}

} // namespace sim

#ifdef SIM_HPU
namespace at {
using SimHPUHooks = sim::SimHooks;
C10_REGISTER_CLASS(HPUHooksRegistry, HPUHooks, SimHPUHooks)
} // namespace at
#endif
