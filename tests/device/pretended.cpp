// An accelerator that is not there: tensors that say they lie on another device, lie in the CPU's memory, and are computed on
// by the CPU's kernels. What it has of a real one is that tensors of different devices do not meet: an operator that gets
// two of them raises, as CUDA does. Of the CPU's, numbers (no dimensions) and, for indexing, positions are allowed, as there.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>

namespace {

constexpr auto HERE = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex DEVICES = 2;
thread_local c10::DeviceIndex current_device = 0;

// ---- memory: the CPU's, under another name --------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : std::malloc(bytes);
    return {data, data, &std::free, c10::Device(HERE, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(HERE, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return HERE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {HERE, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < DEVICES, "There are ", DEVICES, " pretended devices, and none of index ", device.index());
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  // All is done when a call returns, so there is nothing to wait for.
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override { *event = nullptr; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current_device = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return std::exchange(current_device, index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::globalContext().defaultGenerator(c10::Device(c10::DeviceType::CPU));
  }
};

// ---- the same bytes on the other device ----------------------------------------------------------------------------

c10::Storage under(const c10::Storage& storage, c10::Device device) {
  auto* kept = new c10::Storage(storage);
  c10::DataPtr data(
      storage.mutable_data(), kept, [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(device.type()), true};
}

at::Tensor with_storage(const at::Tensor& like, c10::Storage storage, c10::Device device) {
  const c10::DispatchKeySet keys(device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return made;
}

at::Tensor moved(const at::Tensor& tensor, c10::Device device) {
  return with_storage(tensor, under(tensor.storage(), device), device);
}

// ---- every operator: take the CPU's names for all tensors, compute, give the results this device's ---------------------

struct Call {
  const std::string& name;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // here, and under the CPU's name
  std::optional<c10::Device> device;
  bool cpu_met = false;

  void meet(c10::Device other) {
    TORCH_CHECK(
        !device || *device == other, name, ": Expected all tensors to be on the same device, but found ", *device, " and ",
        other);
    device = other;
  }

  at::Tensor taken(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != HERE) {
      cpu_met = cpu_met || tensor.dim() > 0;
      return tensor;
    }
    for (const auto& [here, cpu] : pairs)
      if (here.is_same(tensor)) return cpu;
    meet(tensor.device());
    pairs.emplace_back(tensor, moved(tensor, c10::DeviceType::CPU));
    return pairs.back().second;
  }

  c10::IValue taken(const c10::IValue& value) {
    if (value.isTensor()) return taken(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& each : value.toTensorVector()) list.push_back(taken(each));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      const bool met = cpu_met;
      for (const std::optional<at::Tensor>& each : value.toOptionalTensorVector())
        list.push_back(each ? std::optional<at::Tensor>(taken(*each)) : each);
      cpu_met = met;  // positions may lie on the CPU
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == HERE) {
      const auto asked = value.toDevice();
      meet(asked.has_index() ? asked : c10::Device(HERE, current_device));
      return c10::Device(c10::DeviceType::CPU);
    }
    return value;
  }

  at::Tensor given(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (const auto& [here, cpu] : pairs) {
      if (cpu.is_same(tensor)) return here;
      if (cpu.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl())
        return with_storage(tensor, here.storage(), here.device());  // a view
    }
    return moved(tensor, *device);
  }

  void keep_shapes() {  // of what was resized in place
    for (const auto& [here, cpu] : pairs) {
      auto* impl = here.unsafeGetTensorImpl();
      if (cpu.storage().data() != here.storage().data()) impl->set_storage_keep_dtype(under(cpu.storage(), here.device()));
      if (cpu.sizes() != here.sizes() || cpu.strides() != here.strides())
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

void compute_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call{op.schema().name()};
  const auto count = op.schema().arguments().size();
  for (auto& argument : torch::jit::last(*stack, count).vec()) {
    stack->push_back(call.taken(argument));
  }
  stack->erase(stack->end() - 2 * count, stack->end() - count);
  TORCH_CHECK(
      !call.cpu_met || call.pairs.empty(), op.schema().name(),
      ": Expected all tensors to be on the same device, but found at least two, cpu and ", call.device.value_or(c10::kCPU));
  if (!call.device) call.device = c10::Device(HERE, current_device);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.keep_shapes();
  const auto results = op.schema().returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) {
    auto& result = (*stack)[i];
    if (result.isTensor()) {
      result = call.given(result.toTensor());
    } else if (result.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& each : result.toTensorVector()) list.push_back(call.given(each));
      result = list;
    }
  }
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(HERE, current_device)));
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(HERE, current_device)));
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  const auto cpu = [](const at::Tensor& tensor) { return tensor.is_cpu() ? tensor : moved(tensor, c10::kCPU); };
  auto target = cpu(to);
  target.copy_(cpu(from));
  return to;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return tensor;
}

at::Tensor& set_whole_storage(at::Tensor& tensor, at::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_storage(tensor, std::move(storage), 0, {size}, {1});
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT)
}

TORCH_LIBRARY(pretended, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("current_device", []() -> int64_t { return current_device; });
  m.def("set_device", [](int64_t index) { Guard().setDevice({HERE, static_cast<c10::DeviceIndex>(index)}); });
}
