// The kernels that play.cpp puts one behind the other. memory: at a multiple of 64, as much as their room says.
#pragma once

#include "conv.h"
#include "team.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {

int64_t conv_room(const Conv& call, int threads);
void conv(const Conv& call, void* memory, const Team& team);
int64_t attention_room(const Attention& call, int threads);
void attention(const Attention& call, void* memory, const Team& team);
int64_t linear_room(const Linear& call, int threads);
void linear(const Linear& call, void* memory, const Team& team);

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
