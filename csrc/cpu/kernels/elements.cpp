// Kernels over runs of elements: conversion between types, the arithmetic of merge, and attention mass.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/math.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

KV_INLINE int width_of(DType t) { return t == DType::f32 ? 4 : 2; }

KV_INLINE V load_as(DType type, const void* p) {
    if (type == DType::bf16) return load_bf16(p);
    if (type == DType::f16) return load_f16(p);
    return load(static_cast<const float*>(p));
}
KV_INLINE void store_as(DType type, void* p, V x) {
    if (type == DType::bf16) return store_bf16(p, x);
    if (type == DType::f16) return store_f16(p, x);
    store(static_cast<float*>(p), x);
}

void convert(void* dst, DType dst_type, const void* src, DType src_type, int32_t n) {
    const int to = width_of(dst_type), from = width_of(src_type);
    if (dst_type == src_type) {
        __builtin_memcpy(dst, src, static_cast<unsigned long>(n) * to);
        return;
    }
    char* out = static_cast<char*>(dst);
    const char* in = static_cast<const char*>(src);
    int i = 0;
    for (; i + 16 <= n; i += 16) store_as(dst_type, out + i * to, load_as(src_type, in + i * from));
    if (i < n) {
        unsigned char line[64] = {}, result[64];
        __builtin_memcpy(line, in + i * from, static_cast<unsigned long>(n - i) * from);
        store_as(dst_type, result, load_as(src_type, line));
        __builtin_memcpy(out + i * to, result, static_cast<unsigned long>(n - i) * to);
    }
}

void axpy(float* acc, const float* x, float w, int32_t n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(acc + i, fma(set1(w), load(x + i), load(acc + i)));
    if (i < n) store_part(acc + i, fma(set1(w), load_part(x + i, n - i), load_part(acc + i, n - i)), n - i);
}

void divide(float* acc, float w, int32_t n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(acc + i, div(load(acc + i), set1(w)));
    if (i < n) store_part(acc + i, div(load_part(acc + i, n - i), set1(w)), n - i);
}

// exp(z - lse), and 0 where z is -inf whatever lse is.
KV_INLINE V share(const float* z, float lse) {
    const V x = load(z);
    return blend(differ(x, set1(-__builtin_inff())), exp(sub(x, set1(lse))), zero());
}
void mass_add(float* mass, const float* z, float lse, int32_t entries) {
    for (int e = 0; e < entries; ++e) {
        store(mass + e * kSlots, add(load(mass + e * kSlots), share(z + e * kSlots, lse)));
    }
}
void mass_max(float* mass, const float* z, float lse, int32_t entries) {
    for (int e = 0; e < entries; ++e) {  // (old, new): a NaN share stays
        const V old = load(mass + e * kSlots), now = share(z + e * kSlots, lse);
        const V most = max(old, now);
        store(mass + e * kSlots, blend(differ(old, old), old, most));
    }
}

}  // namespace

void fill_elements(Kernels* table) {
    table->convert = convert;
    table->axpy = axpy;
    table->divide = divide;
    table->mass_add = mass_add;
    table->mass_max = mass_max;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_elements(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
