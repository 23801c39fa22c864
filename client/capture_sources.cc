#include "client/capture_sources.h"

#include <cstring>
#include <utility>

#include "base/text.h"
#include "kernels/strided.h"

namespace stillframe::client {

bool is_strided(const format::TensorSpec& spec, const std::int64_t* stride_bytes) noexcept {
  if (stride_bytes == nullptr) return false;
  auto expected_bytes = static_cast<std::int64_t>(format::element_bytes(spec.dtype));
  for (std::size_t i = spec.shape.size(); i-- > 0;) {
    if (spec.shape[i] == 0) return false;
    // A dimension of one element is never stepped over.
    if (spec.shape[i] == 1) continue;
    if (stride_bytes[i] != expected_bytes) return true;
    expected_bytes *= static_cast<std::int64_t>(spec.shape[i]);
  }
  return false;
}

CaptureSources::CaptureSources(std::shared_ptr<const Layout> layout)
    : layout_(std::move(layout)), strides_(layout_->tensors.size()) {
  for (const LayoutPart& part : layout_->parts) {
    const format::PartImage& image = part.image;
    std::vector<kernels::Source> sources;
    sources.reserve(1 + image.tensors.size());
    sources.push_back({.data = reinterpret_cast<const std::byte*>(image.header.data()),
                       .image_offset = 0,
                       .bytes = image.header.size(),
                       .strides = nullptr});
    for (const format::PlacedTensor& tensor : image.tensors) {
      sources.push_back({.data = nullptr,
                         .image_offset = tensor.offset,
                         .bytes = tensor.bytes,
                         .strides = nullptr});
    }
    parts_.push_back(std::move(sources));
  }
  lazy_.reserve(layout_->tensors.size());
}

Status CaptureSources::fill(std::span<const sf_source> tensors) {
  if (tensors.size() != layout_->tensors.size()) {
    return Error(Code::kInvalidArgument,
                 concat("save: ", tensors.size(), " tensors given, the layout has ",
                        layout_->tensors.size()));
  }
  lazy_.clear();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorPlace place = layout_->tensors[i];
    kernels::Source& source = parts_[place.part][place.source];
    const format::TensorSpec& spec = layout_->tensor(place).spec;
    if (tensors[i].data == nullptr && source.bytes != 0) {
      return Error(Code::kInvalidArgument, concat("save: tensor ", spec.name, " has no memory"));
    }
    if (tensors[i].memory != SF_MEMORY_HOST && tensors[i].memory != SF_MEMORY_CUDA) {
      return Error(Code::kInvalidArgument,
                   concat("save: the memory of tensor ", spec.name, " is no sf_memory"));
    }
    const bool is_on_host = tensors[i].memory == SF_MEMORY_HOST;
    source.data = is_on_host ? static_cast<const std::byte*>(tensors[i].data) : nullptr;
    source.strides = nullptr;
    if (is_strided(spec, tensors[i].stride_bytes)) {
      auto& strides = strides_[i];
      if (!strides) {
        strides = std::make_unique<kernels::Strides>();
        strides->element_bytes = static_cast<std::uint32_t>(format::element_bytes(spec.dtype));
        strides->shape = spec.shape;
      }
      strides->stride_bytes.assign(tensors[i].stride_bytes,
                                   tensors[i].stride_bytes + spec.shape.size());
      source.strides = strides.get();
    }
    if (tensors[i].lazy != 0 && source.bytes != 0 && is_on_host) lazy_.push_back(place);
  }
  return ok();
}

void CaptureSources::set_fetched(std::uint32_t tensor, const std::byte* data) {
  const TensorPlace place = layout_->tensors[tensor];
  parts_[place.part][place.source].data = data;
}

void CaptureSources::copy_eager(std::span<const sf_source> tensors, Bytes slot) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].lazy != 0 || tensors[i].memory != SF_MEMORY_HOST) continue;
    const TensorPlace place = layout_->tensors[i];
    kernels::Source& source = parts_[place.part][place.source];
    if (source.bytes == 0) continue;
    const Bytes target =
        slot.subspan(layout_->parts[place.part].slot_offset + source.image_offset, source.bytes);
    if (source.strides == nullptr) {
      std::memcpy(target.data(), source.data, target.size());
    } else {
      kernels::gather(*source.strides, source.data, 0, target);
    }
    source.data = target.data();
    source.strides = nullptr;
  }
}

}  // namespace stillframe::client
