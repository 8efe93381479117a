// The kernels in the compiler's baseline instruction set; on processors other than x86-64 the only ones.
#define LBR_ISA portable
#define LBR_KERNELS kPortableKernels
#include "isa.h"
