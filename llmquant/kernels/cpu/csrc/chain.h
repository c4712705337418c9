// A chain of small operators on few tokens, run in one go. Mirrors `Step` in ../chain.py.
#pragma once
#include "matrix.h"

enum StepKind : int32_t { LINEAR = 0, ADD = 1, NORM = 2, GATE = 3, ROPE = 4, ATTENTION = 5 };

// All tensors are of one half type (`type` of the chain) and contiguous; results are rounded to it after each operator,
// as torch's own operators round.
struct Step {
    int32_t kind;
    int32_t activation;    // LINEAR
    int64_t group;         // LINEAR: columns that share an activation scale
    const Matrix* weight;  // LINEAR
    const void* x;         // the input, [tokens, width]; ROPE: turned in place; ATTENTION: queries, keys, values
    const void* y;         // LINEAR: bias or null; ADD: the other summand; NORM: weight; GATE: silu of every code; ROPE: cos
    const void* z;         // ROPE: sin, its first half negated
    void* out;
    int64_t width;
    int64_t heads, head;       // ROPE, ATTENTION: the first `heads` heads of `head` elements each
    int64_t place_step;        // ROPE: from one token's cos and sin to the next
    float eps;                 // NORM
    float scale;               // ATTENTION
    int64_t kv_heads;          // ATTENTION, here and below
    void *keys, *values;       // [tokens, kv_heads, room, head]: every token has a sequence of its own
    int64_t length, room;      // places that are written, and that there are; the new one is at `length`
    float* logsumexp;          // [tokens, heads] or null: for tests of the softmax, as `out` is rounded
    StaticScale fixed;         // LINEAR
};
