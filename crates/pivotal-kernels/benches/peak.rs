//! What the processor can do with bf16 operands: AVX-512's products of registers alone, on 1 and on 2 threads at once.
//!
//! `cargo bench -p pivotal-kernels --bench peak`. Items are multiplications and additions. No product of matrices is faster than
//! this; `pivotal bench` measures how fast one is.

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_reduce_add_ps, _mm512_set1_epi32,
        _mm512_setzero_ps,
    };
    use std::hint::black_box;

    use divan::{Bencher, counter::ItemsCount};

    /// Sums that do not wait for each other: more than the instruction's latency has room for.
    const SUMS: usize = 12;
    const ROUNDS: usize = 2_000_000;

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn products() -> f32 {
        // Ones, in pairs.
        let ones = black_box(_mm512_set1_epi32(0x3f80_3f80));
        // SAFETY: both are 512 bits of any content.
        let ones = unsafe { std::mem::transmute::<__m512i, __m512bh>(ones) };
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, ones, ones);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[divan::bench(args = [1, 2], sample_count = 20, sample_size = 1)]
    fn bf16(bencher: Bencher, threads: usize) {
        if !pivotal_kernels::bf16_available() {
            return;
        }
        bencher
            .counter(ItemsCount::new(threads * ROUNDS * SUMS * 64))
            .bench(|| {
                std::thread::scope(|scope| {
                    for _ in 0..threads {
                        // SAFETY: the instructions are there.
                        scope.spawn(|| black_box(unsafe { products() }));
                    }
                });
            });
    }
}

fn main() {
    divan::main();
}
