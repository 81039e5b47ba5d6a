// The best of many numbers, kept in order while all are looked at.
#pragma once

#include "cpu/kernels.h"

namespace kvstrata::cpu {

// Indices of the up to `most` largest of x [n] above `below`, n a multiple of 16, in falling order, ties the lower index.
// Returns how many. Time grows with most: for short lists.
inline int keep_best(const Kernels& kernels, const float* x, int n, float below, int most, int32_t* best) {
    int kept = 0;
    for (int i = 0; most > 0; ++i) {
        i = kernels.next_above(x, i, n, kept < most ? below : x[best[kept - 1]]);
        if (i == n) break;
        int at = kept < most ? kept++ : kept - 1;
        for (; at > 0 && x[best[at - 1]] < x[i]; --at) best[at] = best[at - 1];
        best[at] = i;
    }
    return kept;
}

}  // namespace kvstrata::cpu
