// cooperative_groups.h: as much of the CUDA header of this name as kernels here use, over cuda_on_cpu.h.
#pragma once

namespace cooperative_groups {

struct thread_block {
    unsigned thread_rank() const { return cuda_on_cpu::block->current; }
    unsigned size() const { return cuda_on_cpu::block->launch->threads(); }
    void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const { cuda_on_cpu::syncthreads({file, line}); }
};

struct grid_group {
    unsigned long long size() const
    {
        return 1ull * cuda_on_cpu::block->launch->blocks() * cuda_on_cpu::block->launch->threads();
    }
    unsigned long long thread_rank() const
    {
        unsigned long long block = (1ull * blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        return block * cuda_on_cpu::block->launch->threads() + cuda_on_cpu::block->current;
    }
    void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const { cuda_on_cpu::grid_barrier({file, line}); }
};

inline thread_block this_thread_block() { return {}; }
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
