// Collectives of the simulated device: staged through the host and carried out by another backend (gloo). See sim.h.
//
// Results reach device memory when the work is waited for, never before: a forgotten wait() shows as stale numbers.
#include "sim.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <functional>
#include <set>

namespace sim {
namespace {

using c10::intrusive_ptr;
using c10d::Work;
using Tensors = std::vector<at::Tensor>;

// A running collective: the host buffers it fills, and the device tensors they are copied to.
class StagedWork final : public Work {
 public:
  StagedWork(intrusive_ptr<Work> inner, Tensors staged, Tensors outputs)
      : Work(-1, c10d::OpType::UNKNOWN), inner_(std::move(inner)), staged_(std::move(staged)),
        outputs_(std::move(outputs)) {}

  bool wait(std::chrono::milliseconds timeout) override {
    inner_->wait(timeout);
    deliver();
    return true;
  }
  void synchronize() override {
    wait(kNoTimeout);
  }
  bool isCompleted() override {
    return inner_->isCompleted();
  }
  bool isSuccess() const override {
    return inner_->isSuccess();
  }
  std::exception_ptr exception() const override {
    return inner_->exception();
  }
  int sourceRank() const override {
    return inner_->sourceRank();
  }
  Tensors result() override {
    wait(kNoTimeout);
    return outputs_;
  }
  intrusive_ptr<c10::ivalue::Future> getFuture() override {
    std::vector<c10::Device> devices;
    if (!outputs_.empty()) devices.push_back(outputs_[0].device());
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), devices);
    wait(kNoTimeout);
    future->markCompleted(c10::IValue(outputs_));
    return future;
  }

 private:
  void deliver() {
    std::lock_guard<std::mutex> lock(once_);
    for (size_t i = 0; i < staged_.size(); ++i) host_alias(outputs_[i]).copy_(staged_[i]);
    staged_.clear();
  }
  intrusive_ptr<Work> inner_;
  Tensors staged_, outputs_;
  std::mutex once_;
};

class SimBackend final : public c10d::Backend {
 public:
  SimBackend(std::string name, intrusive_ptr<c10d::Backend> inner, bool averages, std::set<std::string> not_reduced)
      : Backend(inner->getRank(), inner->getSize()), name_(std::move(name)), inner_(std::move(inner)),
        averages_(averages), not_reduced_(std::move(not_reduced)) {}

  const std::string getBackendName() const override {
    return name_;
  }
  intrusive_ptr<Work> broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto staged = stage("broadcast", tensors);
    return work(inner_->broadcast(staged, options), staged, tensors);
  }
  intrusive_ptr<Work> allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    check_reduction(options.reduceOp, tensors);
    auto staged = stage("allreduce", tensors);
    return work(inner_->allreduce(staged, options), staged, tensors);
  }
  intrusive_ptr<Work> allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    check_reduction(options.reduceOp, tensors);
    auto staged = stage("allreduce_coalesced", tensors);
    return work(inner_->allreduce_coalesced(staged, options), staged, tensors);
  }
  intrusive_ptr<Work> reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    check_reduction(options.reduceOp, tensors);
    auto staged = stage("reduce", tensors);
    return work(inner_->reduce(staged, options), staged, tensors);
  }
  intrusive_ptr<Work> allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                                const c10d::AllgatherOptions& options) override {
    auto staged_inputs = stage("allgather", inputs);
    auto staged = stage_lists(outputs);
    return work(inner_->allgather(staged, staged_inputs, options), flat(staged), flat(outputs));
  }
  intrusive_ptr<Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                      const c10d::AllgatherOptions& options) override {
    auto staged_input = stage_one("allgather_base", input), staged = blank(output);
    return work(inner_->_allgather_base(staged, staged_input, options), {staged}, {output});
  }
  intrusive_ptr<Work> allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                      const c10d::AllgatherOptions& options) override {
    auto staged_inputs = stage("allgather_into_tensor_coalesced", inputs);
    auto staged = blanks(outputs);
    return work(inner_->allgather_into_tensor_coalesced(staged, staged_inputs, options), staged, outputs);
  }
  intrusive_ptr<Work> gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto staged_inputs = stage("gather", inputs);
    auto staged = stage_lists(outputs);
    return work(inner_->gather(staged, staged_inputs, options), flat(staged), flat(outputs));
  }
  intrusive_ptr<Work> scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                              const c10d::ScatterOptions& options) override {
    auto staged = blanks(outputs);
    count("scatter");
    auto staged_inputs = stage_lists(inputs);
    return work(inner_->scatter(staged, staged_inputs, options), staged, outputs);
  }
  intrusive_ptr<Work> reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                     const c10d::ReduceScatterOptions& options) override {
    check_reduction(options.reduceOp, outputs);
    auto staged = blanks(outputs);
    count("reduce_scatter");
    auto staged_inputs = stage_lists(inputs);
    return work(inner_->reduce_scatter(staged, staged_inputs, options), staged, outputs);
  }
  intrusive_ptr<Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                           const c10d::ReduceScatterOptions& options) override {
    check_reduction(options.reduceOp, {output});
    auto staged_input = stage_one("reduce_scatter_base", input), staged = blank(output);
    return work(inner_->_reduce_scatter_base(staged, staged_input, options), {staged}, {output});
  }
  intrusive_ptr<Work> reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                      const c10d::ReduceScatterOptions& options) override {
    check_reduction(options.reduceOp, outputs);
    auto staged_inputs = stage("reduce_scatter_tensor_coalesced", inputs);
    auto staged = blanks(outputs);
    return work(inner_->reduce_scatter_tensor_coalesced(staged, staged_inputs, options), staged, outputs);
  }
  intrusive_ptr<Work> alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_sizes,
                                    std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& options) override {
    auto staged_input = stage_one("alltoall_base", input), staged = blank(output);
    return work(inner_->alltoall_base(staged, staged_input, output_sizes, input_sizes, options), {staged}, {output});
  }
  intrusive_ptr<Work> alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    auto staged_inputs = stage("alltoall", inputs);
    auto staged = blanks(outputs);
    return work(inner_->alltoall(staged, staged_inputs, options), staged, outputs);
  }
  intrusive_ptr<Work> send(Tensors& tensors, int to, int tag) override {
    auto staged = stage("send", tensors);
    // The host buffers must live until they are sent: they are kept as outputs of a work that copies nothing.
    return c10::make_intrusive<KeepingWork>(inner_->send(staged, to, tag), staged);
  }
  intrusive_ptr<Work> recv(Tensors& tensors, int from, int tag) override {
    count("recv");
    auto staged = blanks(tensors);
    return work(inner_->recv(staged, from, tag), staged, tensors);
  }
  intrusive_ptr<Work> recvAnysource(Tensors& tensors, int tag) override {
    count("recv");
    auto staged = blanks(tensors);
    return work(inner_->recvAnysource(staged, tag), staged, tensors);
  }
  intrusive_ptr<Work> barrier(const c10d::BarrierOptions& options) override {
    count("barrier");
    auto plain = options;
    plain.device_ids.clear();
    plain.device.reset();
    return inner_->barrier(plain);
  }
  void setSequenceNumberForGroup() override {
    inner_->setSequenceNumberForGroup();
  }
  uint64_t getSequenceNumberForGroup() override {
    return inner_->getSequenceNumberForGroup();
  }

 private:
  class KeepingWork final : public Work {
   public:
    KeepingWork(intrusive_ptr<Work> inner, Tensors kept) : inner_(std::move(inner)), kept_(std::move(kept)) {}
    bool wait(std::chrono::milliseconds timeout) override {
      return inner_->wait(timeout);
    }
    bool isCompleted() override {
      return inner_->isCompleted();
    }

   private:
    intrusive_ptr<Work> inner_;
    Tensors kept_;
  };

  static intrusive_ptr<Work> work(intrusive_ptr<Work> inner, Tensors staged, Tensors outputs) {
    return c10::make_intrusive<StagedWork>(std::move(inner), std::move(staged), std::move(outputs));
  }
  static void count(const char* collective) {
    std::lock_guard<std::mutex> lock(counters().mutex);
    ++counters().collectives[collective];
  }
  void check_device(const at::Tensor& tensor) const {
    TORCH_CHECK(on_device(tensor), name_, ": a tensor is on ", tensor.device(), ", expected ",
                c10::Device(kType, current_device().index()));
    TORCH_CHECK(tensor.is_contiguous(), name_, ": tensors must be contiguous");
  }
  at::Tensor stage_one(const char* collective, const at::Tensor& tensor) const {
    count(collective);
    check_device(tensor);
    return host_alias(tensor).clone();
  }
  Tensors stage(const char* collective, const Tensors& tensors) const {
    count(collective);
    Tensors result;
    for (const auto& tensor : tensors) {
      check_device(tensor);
      result.push_back(host_alias(tensor).clone());
    }
    return result;
  }
  at::Tensor blank(const at::Tensor& tensor) const {
    check_device(tensor);
    return at::empty_like(host_alias(tensor));
  }
  Tensors blanks(const Tensors& tensors) const {
    Tensors result;
    for (const auto& tensor : tensors) result.push_back(blank(tensor));
    return result;
  }
  std::vector<Tensors> stage_lists(const std::vector<Tensors>& lists) const {
    std::vector<Tensors> result;
    for (const auto& list : lists) {
      result.emplace_back();
      for (const auto& tensor : list) {
        check_device(tensor);
        result.back().push_back(host_alias(tensor).clone());
      }
    }
    return result;
  }
  static Tensors flat(const std::vector<Tensors>& lists) {
    Tensors result;
    for (const auto& list : lists) result.insert(result.end(), list.begin(), list.end());
    return result;
  }
  void check_reduction(const c10d::ReduceOp& op, const Tensors& tensors) const {
    TORCH_CHECK(averages_ || op != c10d::ReduceOp::AVG, name_, ": unsupported ReduceOp AVG");
    for (const auto& tensor : tensors) {
      auto dtype = std::string(c10::toString(tensor.scalar_type()));
      TORCH_CHECK(not_reduced_.count(dtype) == 0, name_, ": unsupported data type of a reduction: ", dtype);
    }
  }

  std::string name_;
  intrusive_ptr<c10d::Backend> inner_;
  bool averages_;
  std::set<std::string> not_reduced_;
};

#ifdef SIM_HPU
// torch registers its collective operators for CUDA, XPU, PrivateUse1 and CPU tensors; for HPU the backend has to. They
// read their arguments by name, as the C++ signatures differ between versions of torch.
class Arguments {
 public:
  Arguments(const c10::FunctionSchema& schema, torch::jit::Stack& stack) : schema_(schema), stack_(stack) {}

  const c10::IValue& operator[](const char* name) const {
    auto index = schema_.argumentIndexWithName(name);
    TORCH_CHECK(index.has_value(), schema_.name(), " has no argument ", name);
    return torch::jit::peek(stack_, static_cast<size_t>(*index), schema_.arguments().size());
  }
  Tensors tensors(const char* name) const {
    return (*this)[name].toTensorVector();
  }
  std::vector<Tensors> lists(const char* name) const {
    std::vector<Tensors> result;
    for (const c10::IValue& list : (*this)[name].toListRef()) result.push_back(list.toTensorVector());
    return result;
  }
  int number(const char* name) const {
    return static_cast<int>((*this)[name].toInt());
  }
  template <class Options>
  Options options() const {
    Options options;
    if (schema_.argumentIndexWithName("async_op")) options.asyncOp = (*this)["async_op"].toBool();
    if (schema_.argumentIndexWithName("timeout")) options.timeout = std::chrono::milliseconds(number("timeout"));
    if constexpr (requires { options.reduceOp; })
      options.reduceOp = *(*this)["reduce_op"].toCustomClass<c10d::ReduceOp>();
    if constexpr (requires { options.rootRank; }) options.rootRank = number("root_rank");
    if constexpr (requires { options.rootTensor; }) options.rootTensor = number("root_tensor");
    return options;
  }

 private:
  const c10::FunctionSchema& schema_;
  torch::jit::Stack& stack_;
};

using Collective = std::function<intrusive_ptr<Work>(const Arguments&, c10d::Backend&)>;

template <auto Method, class Options>
Collective in_place() {
  return [](const Arguments& a, c10d::Backend& backend) {
    auto tensors = a.tensors("tensors");
    return (backend.*Method)(tensors, a.options<Options>());
  };
}
template <auto Method, class Options>
Collective flat_to_flat(const char* output, const char* input) {
  return [=](const Arguments& a, c10d::Backend& backend) {
    auto to = a[output].toTensor(), from = a[input].toTensor();
    return (backend.*Method)(to, from, a.options<Options>());
  };
}
template <auto Method, class Options>
Collective list_to_list(const char* outputs, const char* inputs) {
  return [=](const Arguments& a, c10d::Backend& backend) {
    auto to = a.tensors(outputs), from = a.tensors(inputs);
    return (backend.*Method)(to, from, a.options<Options>());
  };
}
template <auto Method, class Options>
Collective list_to_lists() {
  return [](const Arguments& a, c10d::Backend& backend) {
    auto to = a.lists("output_tensors");
    auto from = a.tensors("input_tensors");
    return (backend.*Method)(to, from, a.options<Options>());
  };
}
template <auto Method, class Options>
Collective lists_to_list() {
  return [](const Arguments& a, c10d::Backend& backend) {
    auto to = a.tensors("output_tensors");
    auto from = a.lists("input_tensors");
    return (backend.*Method)(to, from, a.options<Options>());
  };
}

const std::map<std::string, Collective>& hpu_collectives() {
  using B = c10d::Backend;
  static const std::map<std::string, Collective> table = {
      {"broadcast_", in_place<&B::broadcast, c10d::BroadcastOptions>()},
      {"allreduce_", in_place<&B::allreduce, c10d::AllreduceOptions>()},
      {"allreduce_coalesced_", in_place<&B::allreduce_coalesced, c10d::AllreduceCoalescedOptions>()},
      {"reduce_", in_place<&B::reduce, c10d::ReduceOptions>()},
      {"allgather_", list_to_lists<&B::allgather, c10d::AllgatherOptions>()},
      {"gather_", list_to_lists<&B::gather, c10d::GatherOptions>()},
      {"scatter_", lists_to_list<&B::scatter, c10d::ScatterOptions>()},
      {"reduce_scatter_", lists_to_list<&B::reduce_scatter, c10d::ReduceScatterOptions>()},
      {"_allgather_base_", flat_to_flat<&B::_allgather_base, c10d::AllgatherOptions>("output_tensor", "input_tensor")},
      {"_reduce_scatter_base_",
       flat_to_flat<&B::_reduce_scatter_base, c10d::ReduceScatterOptions>("output_tensor", "input_tensor")},
      {"allgather_into_tensor_coalesced_",
       list_to_list<&B::allgather_into_tensor_coalesced, c10d::AllgatherOptions>("outputs", "inputs")},
      {"reduce_scatter_tensor_coalesced_",
       list_to_list<&B::reduce_scatter_tensor_coalesced, c10d::ReduceScatterOptions>("outputs", "inputs")},
      {"alltoall_", list_to_list<&B::alltoall, c10d::AllToAllOptions>("output_tensors", "input_tensors")},
      {"alltoall_base_",
       [](const Arguments& a, B& backend) {
         auto to = a["output"].toTensor(), from = a["input"].toTensor();
         auto to_sizes = a["output_split_sizes"].toIntVector(), from_sizes = a["input_split_sizes"].toIntVector();
         return backend.alltoall_base(to, from, to_sizes, from_sizes, a.options<c10d::AllToAllOptions>());
       }},
      {"barrier", [](const Arguments& a, B& backend) { return backend.barrier(a.options<c10d::BarrierOptions>()); }},
      {"send",
       [](const Arguments& a, B& backend) {
         auto tensors = a.tensors("tensors");
         return backend.send(tensors, a.number("dst"), a.number("tag"));
       }},
      {"recv_",
       [](const Arguments& a, B& backend) {
         auto tensors = a.tensors("tensors");
         return backend.recv(tensors, a.number("src"), a.number("tag"));
       }},
      {"recv_any_source_",
       [](const Arguments& a, B& backend) {
         auto tensors = a.tensors("tensors");
         return backend.recvAnysource(tensors, a.number("tag"));
       }},
  };
  return table;
}

void hpu_collective(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op.schema(), *stack);
  auto backend = arguments["process_group"].toCustomClass<c10d::ProcessGroup>()->getBackend(kType);
  auto name = op.schema().name().substr(std::string("c10d::").size());
  auto work = hpu_collectives().at(name)(arguments, *backend);
  auto tensors = torch::jit::peek(*stack, 0, op.schema().arguments().size()); // the first argument is also returned
  torch::jit::drop(*stack, op.schema().arguments().size());
  if (op.schema().returns().size() == 2) stack->push_back(tensors);
  stack->push_back(c10::IValue(work));
}

TORCH_LIBRARY_IMPL(c10d, HPU, m) {
  for (const auto& entry : hpu_collectives())
    m.impl(entry.first.c_str(), torch::CppFunction::makeFromBoxedFunction<&hpu_collective>());
}
#endif

} // namespace

void bind_collectives(py::module_& m) {
  m.def(
      "staged_backend",
      [](const std::string& name, const intrusive_ptr<c10d::Backend>& inner, bool averages,
         const std::set<std::string>& not_reduced) -> intrusive_ptr<c10d::Backend> {
        return c10::make_intrusive<SimBackend>(name, inner, averages, not_reduced);
      },
      py::arg("name"), py::arg("inner"), py::arg("averages"), py::arg("not_reduced"));
}

void bind_device(py::module_& m);
void bind_kernels(py::module_& m);

} // namespace sim

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Simulated accelerator for tests; not vendor software";
  sim::bind_device(m);
  sim::bind_kernels(m);
  sim::bind_collectives(m);
}
