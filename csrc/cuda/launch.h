// CUDA's runtime, or what stands for it on the CPU.
#pragma once

#if defined(RLCORE_EMULATE)
#include "emulate/cuda.h"
#else
#include <cuda_runtime.h>
#endif
