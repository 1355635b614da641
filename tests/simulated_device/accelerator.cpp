// A pretend accelerator: its memory is the host's and its kernels are the CPU's. What CUDA refuses it refuses, too:
// tensors of two devices in one operator, and a generator of the CPU for tensors of the device. On request it refuses
// float64, as MPS does. It has a random generator of its own, and fused cells for LSTM and GRU, as CUDA has.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>

namespace {

using at::IntArrayRef;
using at::Tensor;
using Layout = std::optional<at::Layout>;
using MaybeDevice = std::optional<at::Device>;
using MaybeTensor = std::optional<Tensor>;
using MaybeType = std::optional<at::ScalarType>;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(KIND, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
bool refuses_float64 = false;
int64_t drawn = 0;  // operators that drew random numbers on the device

// One device with one stream, on which everything is done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &c10::free_cpu, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

// A CPU generator that says it is the device's.
struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(uint64_t seed = c10::default_rng_seed_val) : at::CPUGeneratorImpl(seed) {
    device_ = DEVICE;
    key_set_ = KEYS;
  }
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<DeviceGenerator>();
  return generator;
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  if (bytes <= storage.nbytes()) return;
  auto larger = memory.allocate(bytes);
  if (storage.data()) std::memcpy(larger.get(), storage.data(), storage.nbytes());
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }  // torch 2.6 has neither of these two to override
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<DeviceGenerator>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == KIND; }

void check_type(MaybeType type) {
  TORCH_CHECK_TYPE(
      !(refuses_float64 && type && *type == at::kDouble),
      "Cannot convert a sim Tensor to float64 dtype as the sim framework doesn't support float64. Please use float32 "
      "instead.");
}

// The same memory as a tensor of the CPU.
Tensor to_host(const Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  void* data = tensor.numel() ? const_cast<void*>(tensor.storage().data()) : nullptr;
  const auto options = at::TensorOptions().dtype(tensor.scalar_type());
  if (!data) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  const auto entries = static_cast<int64_t>(tensor.storage().nbytes() / tensor.itemsize());
  return at::from_blob(data, {entries}, options).as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

MaybeTensor to_host(const MaybeTensor& tensor) { return tensor ? MaybeTensor(to_host(*tensor)) : tensor; }

// A copy on the device.
Tensor to_device(const Tensor& tensor) {
  if (!tensor.defined() || on_device(tensor)) return tensor;
  check_type(tensor.scalar_type());
  Tensor out = at::detail::empty_strided_generic(
      tensor.sizes(), tensor.strides(), &memory, KEYS, tensor.scalar_type());
  to_host(out).copy_(tensor);
  return out;
}

// A view, in the memory of a tensor of the device, that looks as one of the CPU does.
Tensor view_on_device(const Tensor& owner, const Tensor& like) {
  Tensor out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(owner.storage()), KEYS, like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}

Tensor empty(IntArrayRef sizes, MaybeType type, Layout, MaybeDevice, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  check_type(c10::dtype_or_default(type));
  return at::detail::empty_generic(sizes, &memory, KEYS, c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, MaybeType type, Layout, MaybeDevice, std::optional<bool>) {
  check_type(c10::dtype_or_default(type));
  return at::detail::empty_strided_generic(sizes, strides, &memory, KEYS, c10::dtype_or_default(type));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef symbolic, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(symbolic);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  resize_storage(self.storage(), (c10::multiply_integers(sizes) + self.storage_offset()) * self.itemsize());
  return self;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  to_host(target).copy_(to_host(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (target.sizes() != source.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar item(const Tensor& tensor) { return to_host(tensor).item(); }

Tensor& set_(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  return at::cpu::set_(self, storage, offset, sizes, strides);
}

Tensor as_strided(const Tensor& self, IntArrayRef sizes, IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

Tensor convolution(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  const bool together = on_device(x) && on_device(weight) && (!bias || !bias->defined() || on_device(*bias));
  TORCH_CHECK(together, "Expected all tensors to be on the same device, in aten::convolution");
  return to_device(at::convolution(to_host(x), to_host(weight), to_host(bias), stride, padding, dilation, transposed,
                                   output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto [of_x, of_weight, of_bias] =
      at::convolution_backward(to_host(gradient), to_host(x), to_host(weight), IntArrayRef({channels}), stride, padding,
                               dilation, transposed, output_padding, groups, wanted);
  return {to_device(of_x), to_device(of_weight), to_device(of_bias)};
}

// The fused cells, with the workspaces that CUDA's leave to their backward passes.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& from_input, const Tensor& from_hidden, const Tensor& cx,
                                             const MaybeTensor& input_bias, const MaybeTensor& hidden_bias) {
  Tensor gates = to_host(from_input) + to_host(from_hidden);
  if (input_bias && input_bias->defined()) gates = gates + to_host(*input_bias) + to_host(*hidden_bias);
  const auto parts = gates.chunk(4, 1);
  const Tensor in = parts[0].sigmoid(), forget = parts[1].sigmoid(), cell = parts[2].tanh(), out = parts[3].sigmoid();
  const Tensor cy = forget * to_host(cx) + in * cell;
  return {to_device(out * cy.tanh()), to_device(cy), to_device(at::cat({in, forget, cell, out}, 1))};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const MaybeTensor& of_hy, const MaybeTensor& of_cy,
                                                      const Tensor& cx, const Tensor& cy, const Tensor& workspace,
                                                      bool has_bias) {
  const auto parts = to_host(workspace).chunk(4, 1);
  const Tensor in = parts[0], forget = parts[1], cell = parts[2], out = parts[3];
  const Tensor squashed = to_host(cy).tanh(), zero = at::zeros_like(squashed);
  const Tensor of_out = of_hy && of_hy->defined() ? to_host(*of_hy) : zero;
  const Tensor of_later = of_cy && of_cy->defined() ? to_host(*of_cy) : zero;
  const Tensor of_cell = of_out * out * (1 - squashed * squashed) + of_later;
  const Tensor of_gates = at::cat({of_cell * cell * (1 - in) * in, of_cell * to_host(cx) * (1 - forget) * forget,
                                   of_cell * in * (1 - cell * cell), of_out * squashed * (1 - out) * out}, 1);
  return {to_device(of_gates), to_device(of_cell * forget), has_bias ? to_device(of_gates.sum(0)) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& from_input, const Tensor& from_hidden, const Tensor& hx,
                                    const MaybeTensor& input_bias, const MaybeTensor& hidden_bias) {
  Tensor x = to_host(from_input), h = to_host(from_hidden), before = to_host(hx);
  if (input_bias && input_bias->defined()) {
    x = x + to_host(*input_bias);
    h = h + to_host(*hidden_bias);
  }
  const auto of_x = x.chunk(3, 1), of_h = h.chunk(3, 1);
  const Tensor reset = (of_x[0] + of_h[0]).sigmoid(), update = (of_x[1] + of_h[1]).sigmoid();
  const Tensor fresh = (of_x[2] + reset * of_h[2]).tanh();
  const Tensor workspace = at::cat({reset, update, fresh, before, of_h[2]}, 1);
  return {to_device((before - fresh) * update + fresh), to_device(workspace)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& of_hy, const Tensor& workspace,
                                                                     bool has_bias) {
  const auto parts = to_host(workspace).chunk(5, 1);
  const Tensor reset = parts[0], update = parts[1], fresh = parts[2], hx = parts[3], hidden = parts[4];
  const Tensor given = to_host(of_hy);
  const Tensor of_update = given * (hx - fresh) * (1 - update) * update;
  const Tensor of_fresh = given * (1 - update) * (1 - fresh * fresh);
  const Tensor of_reset = of_fresh * hidden * (1 - reset) * reset;
  const Tensor of_x = at::cat({of_reset, of_update, of_fresh}, 1);
  const Tensor of_h = at::cat({of_reset, of_update, of_fresh * reset}, 1);
  const Tensor none;
  return {to_device(of_x), to_device(of_h), to_device(given * update), has_bias ? to_device(of_x.sum(0)) : none,
          has_bias ? to_device(of_h.sum(0)) : none};
}

// Draws with the CPU's default generator come from the device's generator while this lives.
class Drawing {
 public:
  Drawing(bool draws, at::Generator source) : draws_(draws), source_(std::move(source)) {
    if (!draws_) return;
    ++drawn;
    before_ = at::detail::getDefaultCPUGenerator().get_state().clone();
    set(at::detail::getDefaultCPUGenerator(), source_.get_state());
  }
  ~Drawing() {
    if (!draws_) return;
    set(source_, at::detail::getDefaultCPUGenerator().get_state());
    set(at::detail::getDefaultCPUGenerator(), before_);
  }

 private:
  static void set(const at::Generator& generator, const Tensor& state) {
    at::Generator(generator).set_state(state);
  }
  bool draws_;
  at::Generator source_;
  Tensor before_;
};

// Any other operator runs on the CPU, in the same memory.
class OnHost {
 public:
  OnHost(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), stack_(*stack), count_(op.schema().arguments().size()), first_(stack->size() - count_),
        generator_(default_generator()) {}

  void run() {
    for (size_t i = 0; i < count_; i++) take(i);
    TORCH_CHECK(!(of_device_ && of_host_), "Expected all tensors to be on the same device, but found at least two "
                "devices, sim:0 and cpu, in ", op_.schema().name());
    TORCH_CHECK(!(of_device_ && host_generator_), "Expected a 'sim' device type for generator but found 'cpu', in ",
                op_.schema().name());
    {
      const Drawing drawing(op_.hasTag(at::Tag::nondeterministic_seeded), generator_);
      op_.callBoxed(&stack_);
    }
    for (auto& [own, host] : taken_) {  // arguments that the operator gave another size
      if (own.sizes() == host.sizes()) continue;
      own.resize_(host.sizes());
      to_host(own).copy_(host);
    }
    const size_t results = op_.schema().returns().size();
    for (size_t i = stack_.size() - results; i < stack_.size(); i++) give_back(stack_[i]);
  }

 private:
  void take(size_t i) {
    auto& value = stack_[first_ + i];
    const auto* alias = op_.schema().arguments()[i].alias_info();
    const bool written = alias && alias->isWrite();
    if (value.isTensor()) {
      value = taken(value.toTensor(), written);
    } else if (value.isTensorList()) {
      std::vector<Tensor> host;
      for (const Tensor& tensor : value.toTensorList()) host.push_back(taken(tensor, written));
      value = c10::List<Tensor>(host);
    } else if (value.isOptionalTensorList()) {  // indices, which CUDA takes from the CPU, too
      const bool before = of_host_;
      c10::List<MaybeTensor> host;
      for (MaybeTensor tensor : value.toOptionalTensorList()) host.push_back(tensor ? taken(*tensor, written) : tensor);
      of_host_ = before;
      value = host;
    } else if (value.isDevice()) {
      value = c10::Device(at::kCPU);
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      if (value.toGenerator().device().type() == KIND) {
        generator_ = value.toGenerator();
        value = c10::IValue();
      } else {
        host_generator_ = true;
      }
    }
  }

  Tensor taken(const Tensor& tensor, bool written) {
    if (!tensor.defined()) return tensor;
    if (!on_device(tensor)) {
      of_host_ = of_host_ || tensor.dim() > 0;  // CUDA takes numbers from the CPU
      return tensor;
    }
    of_device_ = true;
    const bool blank = written && tensor.numel() == 0;
    const Tensor host = blank ? at::empty({0}, tensor.options().device(at::kCPU)) : to_host(tensor);
    taken_.emplace_back(tensor, host);
    return host;
  }

  void give_back(c10::IValue& value) {
    if (value.isTensor()) {
      value = given(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> device;
      for (const Tensor& tensor : value.toTensorList()) device.push_back(given(tensor));
      value = c10::List<Tensor>(device);
    }
  }

  Tensor given(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [own, host] : taken_)
      if (tensor.is_same(host)) return own;
    for (auto& [own, host] : taken_)
      if (tensor.numel() && host.numel() && tensor.storage().data() == host.storage().data())
        return view_on_device(own, tensor);
    return to_device(tensor);
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  size_t count_, first_;
  at::Generator generator_;
  std::vector<std::pair<Tensor, Tensor>> taken_;
  bool of_device_ = false, of_host_ = false, host_generator_ = false;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { OnHost(op, stack).run(); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("as_strided", &as_strided);
  m.impl("view", [](const Tensor& self, IntArrayRef sizes) { return at::native::view(self, sizes); });
  m.impl("_reshape_alias", [](const Tensor& self, IntArrayRef sizes, IntArrayRef strides) {
    return at::native::_reshape_alias(self, sizes, strides);
  });
  m.impl("unfold", [](const Tensor& self, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(self, dim, size, step);
  });
  m.impl("set_.source_Storage_storage_offset", &set_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
}

// What autocast does on CUDA, for the operators of the tests' networks.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
}

TORCH_LIBRARY(simulated, m) {
  m.def("refuse_float64(bool on) -> ()", [](bool on) { refuses_float64 = on; });
  m.def("drawn() -> int", [] { return drawn; });
  m.def("manual_seed(int seed) -> ()", [](int64_t seed) { default_generator().set_current_seed(seed); });
  m.def("get_rng_state() -> Tensor", [] { return default_generator().get_state().clone(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) { default_generator().set_state(state); });
}

}  // namespace
