// Query rows as operands of products, in shared memory, in the form that a page's format wants:
//   f32          [dim][rows] f32
//   bf16, f16    [quad][16 dims][lane][4] terms of the dims 4 b..4 b + 3, lane = 4 a + b: columns 2 r and 2 r + 1 (a of lane) of row r
//   quantized    [quad][32 dims][lane][8] bytes of the dims 8 b..8 b + 7 likewise: n = 256 h + l, R q = delta n
#pragma once

#include "cuda/attend_shape.cuh"
#include "cuda/device/operands.cuh"

namespace kvstrata::cuda {

inline constexpr float kMostCode = 32639.0f;                  // 127 * 257: both bytes of it are signed
inline constexpr float kLeastQuery = 7.888609052210118e-31f;  // 2^-100: a smaller query is zero

// What a block keeps of each of its query rows.
template <class S>
struct QueryRows {
    int64_t at[S::kRows];                     // element of q, or -1: no such row
    int32_t line[S::kRows];                   // of logits [entries, 16], or -1
    float factor[S::kRows];                   // f16 pages: q = factor * operands
    float delta[S::kRows];                    // quantized pages: NaN for a query that holds NaN or Inf
    float centre[S::kRows];                   // q . centre
    int32_t code_sums[kMaxGroups][S::kRows];  // int2 pages: sums of n over each group of dims
};

__device__ inline float load_as(DType type, const void* from, int64_t i) {
    if (type == DType::bf16) return load_element(static_cast<const __nv_bfloat16*>(from) + i);
    if (type == DType::f16) return load_element(static_cast<const __half*>(from) + i);
    return static_cast<const float*>(from)[i];
}

// Whether operands of this format hold all of a query in one term.
__device__ inline bool one_term(Format f, DType q) { return f == Format::bf16 ? q == DType::bf16 : q != DType::f32; }

template <class S>
__device__ inline void find_rows(QueryRows<S>& rows, const AttendArgs& args, const ops::AttendRow& row, int first) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= S::kRows) return;
    const int n = first + i, t = n / args.group;
    const int64_t token = t < row.queries && row.tokens ? row.tokens[t] : t;
    rows.at[i] = t < row.queries ? token * row.q_stride_t + n % args.group * row.q_stride_g : -1;
    rows.line[i] = t < row.queries ? n % args.group * row.queries + t : -1;
}

template <class S>
__device__ inline float query(const QueryRows<S>& rows, const AttendArgs& args, const ops::AttendRow& row, int n,
                              int d) {
    return rows.at[n] >= 0 && d < dim_of<S>(args) ? load_as(args.q_dtype, row.q, rows.at[n] + d) : 0.0f;
}

template <class S>
__device__ inline void prepare_f32(unsigned char* operands, const QueryRows<S>& rows, const AttendArgs& args,
                                   const ops::AttendRow& row) {
    auto* const to = reinterpret_cast<float*>(operands);
    for (int n = warp(); n < S::kRows; n += S::kWarps) {
        for (int d = lane(); d < dim_of<S>(args); d += kWarp) to[d * S::kRows + n] = query(rows, args, row, n, d);
    }
}

// Powers of two that bring each query row into the range of f16.
template <class S>
__device__ inline void find_factors(QueryRows<S>& rows, const AttendArgs& args, const ops::AttendRow& row) {
    for (int n = warp(); n < S::kRows; n += S::kWarps) {
        float most = 0.0f;
        for (int d = lane(); d < dim_of<S>(args); d += kWarp) most = larger(most, fabsf(query(rows, args, row, n, d)));
        most = warp_max(most);
        const uint32_t exponent = __float_as_uint(most) & 0x7F800000u;
        const bool plain = args.q_dtype != DType::f16 && exponent != 0x7F800000u;
        if (lane() == 0) rows.factor[n] = plain ? __uint_as_float(max(exponent, 0x00800000u)) : 1.0f;
    }
}

template <class S, Format F>
__device__ inline void prepare_pairs(unsigned char* operands, QueryRows<S>& rows, const AttendArgs& args,
                                     const ops::AttendRow& row) {
    if constexpr (F == Format::f16) {
        find_factors(rows, args, row);
        __syncthreads();
    }
    auto* const to = reinterpret_cast<uint2*>(operands);
    const int steps = padded_dim(dim_of<S>(args)) / 16;
    const bool both_terms = !one_term(F, args.q_dtype);
    for (int i = static_cast<int>(threadIdx.x); i < S::kRows / 4 * steps * kWarp; i += S::kThreads) {
        const int of_lane = i % kWarp, step = i / kWarp % steps, n = i / kWarp / steps * 4 + of_lane / 8;
        const bool low = of_lane / 4 % 2;
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float q = query(rows, args, row, n, 16 * step + of_lane % 4 * 4 + j);
            if constexpr (F == Format::f16) {
                const float scaled = q / rows.factor[n];
                x[j] = low ? scaled - __half2float(__float2half_rn(scaled)) : scaled;
            } else {
                x[j] = low ? q - from_bf16(to_bf16(q)) : q;
            }
            if (low && !both_terms) x[j] = 0.0f;
        }
        to[i] = F == Format::f16 ? uint2{round_f16(x[0], x[1]), round_f16(x[2], x[3])}
                                 : uint2{round_bf16(x[0], x[1]), round_bf16(x[2], x[3])};
    }
}

// q . centre in the CPU's order of additions: sixteen sums, then those in order.
template <class S>
__device__ inline float dot_centre(const QueryRows<S>& rows, const AttendArgs& args, const ops::AttendRow& row, int n) {
    if (!row.centre) return 0.0f;
    float sum = 0.0f, total = 0.0f;
    for (int d = lane() % 16; d < dim_of<S>(args); d += 16) sum += query(rows, args, row, n, d) * row.centre[d];
    for (int i = 0; i < 16; ++i) total += __shfl_sync(kAllLanes, sum, i);
    return total;
}

// A warp takes a row at a time: dims l, 32 + l, ... are lane l's.
template <class S, Format F>
__device__ inline void prepare_codes(unsigned char* operands, QueryRows<S>& rows, const AttendArgs& args,
                                     const ops::AttendRow& row) {
    constexpr int kEach = S::kDims / kWarp;
    const int steps = round_up(dim_of<S>(args), kWarp) / kWarp;
    const bool halves = group_size(F, dim_of<S>(args)) == 16;
    for (int n = warp(); n < S::kRows; n += S::kWarps) {
        float x[kEach], most = 0.0f;
#pragma unroll
        for (int s = 0; s < kEach; ++s) x[s] = query(rows, args, row, n, s * kWarp + lane());
        rotate(x, args.rotation, false);
        bool finite = true;
#pragma unroll
        for (int s = 0; s < kEach; ++s) {
            finite = finite && fabsf(x[s]) < INFINITY;
            most = fmaxf(most, fabsf(x[s]));
        }
        finite = __all_sync(kAllLanes, finite);
        most = warp_max(most);
        const bool plain = finite && most >= kLeastQuery;
        const float inverse = plain ? kMostCode / most : 0.0f, centre = dot_centre(rows, args, row, n);
        if (lane() == 0) {
            rows.delta[n] = !finite ? NAN : plain ? most / kMostCode : 0.0f;
            rows.centre[n] = centre;
        }
        unsigned char* const to = operands + n / 4 * steps * 256 + n % 4 * 64 + lane();
#pragma unroll
        for (int s = 0; s < kEach; ++s) {
            if (s >= steps) break;
            const int code = plain ? __float2int_rn(x[s] * inverse) : 0, high = (code + 128) >> 8;
            to[s * 256] = static_cast<unsigned char>(high);
            to[s * 256 + 32] = static_cast<unsigned char>(code);  // code - 256 high
            if (F != Format::int2) continue;
            const int sum = __reduce_add_sync(lane() < 16 ? 0xFFFFu : 0xFFFF0000u, code);
            const int other = __shfl_xor_sync(kAllLanes, sum, 16);
            if (lane() == 0) rows.code_sums[halves ? 2 * s : s][n] = halves ? sum : sum + other;
            if (lane() == 16 && halves) rows.code_sums[2 * s + 1][n] = sum;
        }
    }
}

// All threads call it, between barriers.
template <class S, Format F>
__device__ inline void prepare_queries(unsigned char* operands, QueryRows<S>& rows, const AttendArgs& args,
                                       const ops::AttendRow& row) {
    if constexpr (F == Format::f32) {
        prepare_f32(operands, rows, args, row);
    } else if constexpr (is_full(F)) {
        prepare_pairs<S, F>(operands, rows, args, row);
    } else {
        prepare_codes<S, F>(operands, rows, args, row);
    }
}

}  // namespace kvstrata::cuda
