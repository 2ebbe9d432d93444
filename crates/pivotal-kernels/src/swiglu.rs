//! The gated activation `silu(gate)·up` (Shazeer 2020, arXiv:2002.05202) and its gradient.

use crate::lanes::{sigmoid, widest};
use crate::parallel::{SharedOut, check_len, check_matrix, for_each_block, rows_per_block};

const BLOCK: usize = 8192;
/// An element costs about this many multiply-adds: an exponential and a division.
const COST: usize = 16;

#[inline(always)]
fn gated(gate: f32, up: f32) -> f32 {
    gate * sigmoid(gate) * up
}

/// The gradients of the gate and of the up at the upstream gradient `dout`.
#[inline(always)]
fn slopes(gate: f32, up: f32, dout: f32) -> (f32, f32) {
    let open = sigmoid(gate);
    let silu = gate * open;
    (dout * up * (open + silu * (1.0 - open)), dout * silu)
}

/// `out = gate · σ(gate) · up`, element by element.
///
/// # Panics
/// If the three lengths differ.
///
/// # Examples
/// ```
/// let mut out = [0.0; 2];
/// pivotal_kernels::swiglu_forward(&[0.0, 100.0], &[5.0, 2.0], &mut out);
/// assert_eq!(out, [0.0, 200.0]);
/// ```
pub fn swiglu_forward(gate: &[f32], up: &[f32], out: &mut [f32]) {
    check_len("up", up, gate.len());
    check_len("out", out, gate.len());
    let target = SharedOut::new(out);
    for_each_block(gate.len(), BLOCK, COST * gate.len(), |block| {
        // SAFETY: the blocks are disjoint parts of `out`.
        let out = unsafe { target.slice(block.start, block.len()) };
        for ((out, &gate), &up) in out.iter_mut().zip(&gate[block.clone()]).zip(&up[block]) {
            *out = gated(gate, up);
        }
    });
}

/// The gradient of [`swiglu_forward`]: `dgate = dout·up·σ(g)(1 + g(1 - σ(g)))`, `dup = dout·g·σ(g)`. Both are overwritten.
///
/// # Panics
/// If the five lengths differ.
pub fn swiglu_backward(gate: &[f32], up: &[f32], dout: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    check_len("up", up, gate.len());
    check_len("dout", dout, gate.len());
    check_len("dgate", dgate, gate.len());
    check_len("dup", dup, gate.len());
    let (dgate, dup) = (SharedOut::new(dgate), SharedOut::new(dup));
    for_each_block(gate.len(), BLOCK, COST * gate.len(), |block| {
        let (start, len) = (block.start, block.len());
        // SAFETY: the blocks are disjoint parts of both gradients.
        let (dgate, dup) = unsafe { (dgate.slice(start, len), dup.slice(start, len)) };
        let (gate, up, dout) = (
            &gate[start..][..len],
            &up[start..][..len],
            &dout[start..][..len],
        );
        for index in 0..len {
            (dgate[index], dup[index]) = slopes(gate[index], up[index], dout[index]);
        }
    });
}

/// [`swiglu_forward`] where a row holds the gates, then the ups.
///
/// # Shapes
/// `joined` is `[rows, 2 * width]`, `out` is `[rows, width]`.
///
/// # Panics
/// If a slice has another length.
pub fn swiglu_joined_forward(joined: &[f32], width: usize, out: &mut [f32]) {
    check_len("joined", joined, 2 * out.len());
    let rows = out.len() / width.max(1);
    check_matrix("out", out, rows, width);
    let target = SharedOut::new(out);
    for_each_block(rows, rows_per_block(width), COST * joined.len(), |block| {
        for row in block {
            // SAFETY: row `row` of `out` is this block's own.
            let out = unsafe { target.slice(row * width, width) };
            gate_row(&joined[2 * row * width..][..2 * width], out);
        }
    });
}

/// Gates that stand together, before as many ups, in a row of [`swiglu_interleaved_forward`]: a panel of a packed weight's outputs.
pub const GATE_BLOCK: usize = 48;
/// Rows at which blocks of columns are handed to threads, not rows: a thread then finds what it has just multiplied.
const FEW_ROWS: usize = 64;

/// [`swiglu_forward`] where a row holds [`GATE_BLOCK`] gates, their ups, the next gates, and so on; the last may be fewer.
///
/// # Shapes
/// `joined` is `[rows, 2 * width]`, `out` is `[rows, width]`.
///
/// # Panics
/// If a slice has another length.
///
/// # Examples
/// ```
/// let mut out = [0.0; 2];
/// pivotal_kernels::swiglu_interleaved_forward(&[0.0, 100.0, 5.0, 2.0], 2, &mut out);
/// assert_eq!(out, [0.0, 200.0]);
/// ```
pub fn swiglu_interleaved_forward(joined: &[f32], width: usize, out: &mut [f32]) {
    check_len("joined", joined, 2 * out.len());
    let rows = out.len() / width.max(1);
    check_matrix("out", out, rows, width);
    let target = SharedOut::new(out);
    let gate = |row: usize, first: usize| {
        let columns = GATE_BLOCK.min(width - first);
        // SAFETY: these columns of row `row` are this block's own, whichever way the rows and columns are cut.
        let out = unsafe { target.slice(row * width + first, columns) };
        gate_row(&joined[2 * (row * width + first)..][..2 * columns], out);
    };
    let work = COST * joined.len();
    if rows <= FEW_ROWS {
        for_each_block(width.div_ceil(GATE_BLOCK), 1, work, |blocks| {
            for block in blocks {
                (0..rows).for_each(|row| gate(row, block * GATE_BLOCK));
            }
        });
    } else {
        for_each_block(rows, rows_per_block(width), work, |block| {
            for row in block {
                let firsts = (0..width).step_by(GATE_BLOCK);
                firsts.for_each(|first| gate(row, first));
            }
        });
    }
}

/// One row of the output of [`swiglu_joined_forward`].
pub(crate) fn gate_row(joined: &[f32], out: &mut [f32]) {
    let (gate, up) = joined.split_at(out.len());
    widest(
        #[inline(always)]
        || {
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gated(gate, up);
            }
        },
    );
}

/// One row of gates and ups: [`gate_row`]'s output in place of the gates.
pub(crate) fn gate_row_in_place(joined: &mut [f32]) {
    let (gates, ups) = joined.split_at_mut(joined.len() / 2);
    widest(
        #[inline(always)]
        || {
            for (gate, &up) in gates.iter_mut().zip(&*ups) {
                *gate = gated(*gate, up);
            }
        },
    );
}

/// From a row's gates, ups and upstream gradient to the gradients of the first two and the gated activation itself, in place.
pub(crate) fn gate_row_gradient_in_place(gates: &mut [f32], ups: &mut [f32], douts: &mut [f32]) {
    widest(
        #[inline(always)]
        || {
            for ((gate, up), dout) in gates.iter_mut().zip(ups).zip(douts) {
                let out = gated(*gate, *up);
                (*gate, *up) = slopes(*gate, *up, *dout);
                *dout = out;
            }
        },
    );
}

/// The gradient of [`swiglu_joined_forward`], `[rows, 2 * width]`, overwritten.
///
/// # Panics
/// If a slice has another length.
pub fn swiglu_joined_backward(joined: &[f32], width: usize, dout: &[f32], djoined: &mut [f32]) {
    check_len("joined", joined, 2 * dout.len());
    check_len("djoined", djoined, 2 * dout.len());
    let rows = dout.len() / width.max(1);
    check_matrix("dout", dout, rows, width);
    // SAFETY: the gradient has as many elements as `joined`, by the checks above.
    unsafe { joined_gradient(joined, width, dout, SharedOut::new(djoined)) };
}

/// [`swiglu_joined_backward`], every element of it, into memory that need not be initialised.
///
/// # Safety
/// `dout` is `[rows, width]` and `joined` twice as wide; `djoined` has as many floats as `joined`, which nobody else touches
/// meanwhile.
pub(crate) unsafe fn joined_gradient(
    joined: &[f32],
    width: usize,
    dout: &[f32],
    djoined: SharedOut,
) {
    let rows = dout.len() / width.max(1);
    for_each_block(rows, rows_per_block(width), COST * joined.len(), |block| {
        for row in block {
            let (gate, up) = joined[2 * row * width..][..2 * width].split_at(width);
            let dout = &dout[row * width..][..width];
            // SAFETY: row `row` of the gradient is this block's own.
            let djoined = unsafe { djoined.slice(2 * row * width, 2 * width) };
            let (dgate, dup) = djoined.split_at_mut(width);
            widest(
                #[inline(always)]
                || {
                    for index in 0..width {
                        (dgate[index], dup[index]) = slopes(gate[index], up[index], dout[index]);
                    }
                },
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::team::with_team;
    use crate::testing::{assert_close, on_each, on_threads, random};

    // A few roundings each.
    const TOLERANCE: f64 = 1e-6;

    fn silu(gate: f64) -> f64 {
        gate / (1.0 + (-gate).exp())
    }

    #[test]
    fn value_and_gradients_agree_with_f64() {
        for len in [0, 1, 63, 64, 65, 1000] {
            let gate: Vec<f32> = random(len, 1).iter().map(|x| x * 8.0).collect();
            let (up, dout) = (random(len, 2), random(len, 3));
            let mut out = vec![f32::NAN; len];
            swiglu_forward(&gate, &up, &mut out);
            let each = |value: &dyn Fn(f64, f64, f64) -> f64| -> Vec<f64> {
                (0..len)
                    .map(|i| value(f64::from(gate[i]), f64::from(up[i]), f64::from(dout[i])))
                    .collect()
            };
            assert_close("value", &out, &each(&|g, u, _| silu(g) * u), TOLERANCE);
            let (mut dgate, mut dup) = (vec![f32::NAN; len], vec![f32::NAN; len]);
            swiglu_backward(&gate, &up, &dout, &mut dgate, &mut dup);
            assert_close("dup", &dup, &each(&|g, _, d| d * silu(g)), TOLERANCE);
            let slope = |g: f64| (silu(g + 1e-5) - silu(g - 1e-5)) / 2e-5;
            assert_close(
                "dgate",
                &dgate,
                &each(&|g, u, d| d * u * slope(g)),
                TOLERANCE,
            );
        }
    }

    #[test]
    fn interleaved_rows_are_the_same_gates_and_ups() {
        on_each(|| {
            for (rows, width) in [
                (0, 5),
                (1, 1),
                (3, 47),
                (16, 48),
                (63, 96),
                (64, 100),
                (65, 145),
            ] {
                let (gate, up) = (random(rows * width, 1), random(rows * width, 2));
                let mut expected = vec![0.0; rows * width];
                swiglu_forward(&gate, &up, &mut expected);
                let mut joined = Vec::new();
                for (gate, up) in gate.chunks(width).zip(up.chunks(width)) {
                    for (gate, up) in gate.chunks(GATE_BLOCK).zip(up.chunks(GATE_BLOCK)) {
                        joined.extend([gate, up].concat());
                    }
                }
                for threads in [1, 2] {
                    let run = || {
                        let mut out = vec![f32::NAN; rows * width];
                        swiglu_interleaved_forward(&joined, width, &mut out);
                        out
                    };
                    assert!(on_threads(threads, run) == expected);
                    assert!(on_threads(threads, || with_team(run)) == expected);
                }
            }
        });
    }

    #[test]
    fn far_gates_stay_finite() {
        let gate = [-1e30, -200.0, 0.0, 200.0, 1e30];
        let (mut out, mut dgate, mut dup) = ([0.0; 5], [0.0; 5], [0.0; 5]);
        swiglu_forward(&gate, &[1.0; 5], &mut out);
        swiglu_backward(&gate, &[1.0; 5], &[1.0; 5], &mut dgate, &mut dup);
        assert!(out.iter().chain(&dgate).chain(&dup).all(|x| x.is_finite()));
        assert_eq!(dgate[2], 0.5);
        assert_eq!(out[3], 200.0);
    }

    #[test]
    fn threads_change_no_bit() {
        let (gate, up) = (random(100_000, 1), random(100_000, 2));
        let run = || {
            let (mut out, mut dgate) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
            let mut dup = dgate.clone();
            swiglu_forward(&gate, &up, &mut out);
            swiglu_backward(&gate, &up, &out, &mut dgate, &mut dup);
            (out, dgate, dup)
        };
        assert_eq!(on_threads(1, run), on_threads(2, run));
    }

    #[test]
    fn joined_rows_are_the_two_apart() {
        for (rows, width) in [(0, 3), (1, 1), (5, 63), (63, 64), (64, 65), (65, 2)] {
            let joined: Vec<f32> = random(2 * rows * width, 1)
                .iter()
                .map(|x| x * 8.0)
                .collect();
            let dout = random(rows * width, 2);
            let half = |all: &[f32], which: usize| -> Vec<f32> {
                let rows = all.chunks(2 * width);
                rows.flat_map(|row| row[which * width..][..width].to_vec())
                    .collect()
            };
            let (gate, up) = (half(&joined, 0), half(&joined, 1));
            let (mut out, mut expected) = (vec![f32::NAN; rows * width], vec![0.0; rows * width]);
            swiglu_joined_forward(&joined, width, &mut out);
            swiglu_forward(&gate, &up, &mut expected);
            assert_eq!(out, expected);
            let mut slopes = vec![f32::NAN; joined.len()];
            swiglu_joined_backward(&joined, width, &dout, &mut slopes);
            let (mut dgate, mut dup) = (out.clone(), out.clone());
            swiglu_backward(&gate, &up, &dout, &mut dgate, &mut dup);
            assert_eq!((half(&slopes, 0), half(&slopes, 1)), (dgate, dup));
        }
    }

    #[test]
    fn every_path_gives_the_same_bits() {
        let (rows, width) = (3, 37);
        let joined: Vec<f32> = random(2 * rows * width, 4)
            .iter()
            .map(|x| 20.0 * x)
            .collect();
        let dout = random(rows * width, 5);
        let results = std::sync::Mutex::new(Vec::new());
        on_each(|| {
            let (mut out, mut slopes) = (vec![0.0; rows * width], vec![0.0; joined.len()]);
            swiglu_joined_forward(&joined, width, &mut out);
            swiglu_joined_backward(&joined, width, &dout, &mut slopes);
            results.lock().unwrap().push((out, slopes));
        });
        let results = results.into_inner().unwrap();
        assert!(results.iter().all(|result| *result == results[0]));
    }
}
