// Put before every C++ file of llama.cpp by setup.sh (`-include`): `_tile_loadconfig` with all that LDTILECFG reads.
//
// GCC 12.2's header (Debian 12) tells the optimiser that the instruction reads 8 bytes, when it reads 64; newer ones
// have a builtin. The stores that fill the other 56 are partly thrown away as dead, the tiles' shapes are then what lay
// on the stack, and LDTILECFG faults: a segmentation fault in ggml_backend_amx_mul_mat.

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
