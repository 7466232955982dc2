// What the families' bindings share: addresses checked for null and alignment, and the functions that register them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

template <typename T>
T* pointer(std::uintptr_t address, const char* name, bool may_be_null) {
    if (address == 0 && !may_be_null) throw std::invalid_argument(std::string(name) + ": null pointer");
    if (address % alignof(T) != 0) {
        throw std::invalid_argument(std::string(name) + ": address is not a multiple of " + std::to_string(alignof(T)));
    }
    return reinterpret_cast<T*>(address);
}

// Throws unless the offsets (segments + 1 of them) begin at 0 or more and never decrease.
void check_offsets(const std::int64_t* offsets, std::int64_t segments);

void bind_policy_loss(pybind11::module_& m);
void bind_prefix_attention(pybind11::module_& m);
void bind_segments(pybind11::module_& m);
