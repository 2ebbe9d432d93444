//! What is done to the rows that a group of frozen layers reads, before the products, and its gradient after them.

use std::borrow::Cow;
use std::ops::Range;

use super::FrozenSaved;
use crate::account::{Part, time};
use crate::norm::{self, row_rstd, scale_row};
use crate::parallel::{SharedOut, for_each_block, rows_per_block, written, zeros};
use crate::swiglu::{self, gate_row};

/// What is done to each row of the input before the products.
#[derive(Clone, Copy, Debug)]
pub enum Prologue<'a> {
    /// Nothing.
    Plain,
    /// [`rms_norm_forward`](crate::rms_norm_forward).
    Normed {
        /// `[inputs]`.
        weight: &'a [f32],
        /// Added to the mean square.
        eps: f32,
    },
    /// [`swiglu_joined_forward`](crate::swiglu_joined_forward): the rows are twice as wide as the products' input.
    Gated,
}

impl Prologue<'_> {
    /// Length of an input row.
    pub(super) fn width(&self, inputs: usize) -> usize {
        match self {
            Self::Plain | Self::Normed { .. } => inputs,
            Self::Gated => 2 * inputs,
        }
    }

    /// What the accounts call the work of it.
    pub(super) fn part(&self) -> Part {
        match self {
            Self::Plain => Part::Linear,
            Self::Normed { .. } => Part::Norm,
            Self::Gated => Part::Swiglu,
        }
    }

    /// The reciprocal root mean squares of the rows of `x`, if there is a norm.
    pub(super) fn rstd(&self, x: &[f32], inputs: usize) -> Vec<f32> {
        let Self::Normed { eps, .. } = *self else {
            return Vec::new();
        };
        let rows = x.len() / inputs.max(1);
        let mut rstd = vec![0.0; rows];
        let shared = SharedOut::new(&mut rstd);
        for_each_block(rows, rows_per_block(inputs), x.len(), |rows| {
            for row in rows {
                // SAFETY: element `row` is this block's own.
                unsafe { *shared.at(row) = row_rstd(&x[row * inputs..][..inputs], eps) };
            }
        });
        rstd
    }

    /// Rows `rows` of what the products read, one after the other.
    pub(super) fn make(&self, x: &[f32], rstd: &[f32], rows: Range<usize>, out: &mut [f32]) {
        let inputs = out.len() / rows.len().max(1);
        let width = self.width(inputs);
        for (row, out) in rows.zip(out.chunks_exact_mut(inputs.max(1))) {
            let x = &x[row * width..][..width];
            match self {
                Self::Plain => out.copy_from_slice(x),
                Self::Normed { weight, .. } => scale_row(x, weight, rstd[row], out),
                Self::Gated => gate_row(x, out),
            }
        }
    }

    /// All rows of what the products read.
    pub(super) fn outcome<'a>(
        &self,
        x: &'a [f32],
        rstd: &[f32],
        rows: usize,
        inputs: usize,
    ) -> Cow<'a, [f32]> {
        if let Self::Plain = self {
            return Cow::Borrowed(x);
        }
        time(self.part(), || {
            let mut out = zeros(rows * inputs);
            let shared = SharedOut::new(&mut out);
            for_each_block(rows, rows_per_block(inputs), 4 * x.len(), |rows| {
                // SAFETY: these rows are this block's own.
                let out = unsafe { shared.slice(rows.start * inputs, rows.len() * inputs) };
                self.make(x, rstd, rows, out);
            });
            Cow::Owned(out)
        })
    }

    /// The gradient of `x` where `dinput` is that of the products' input.
    pub(super) fn gradient(
        &self,
        saved: FrozenSaved<'_>,
        inputs: usize,
        dinput: Cow<'_, [f32]>,
    ) -> Vec<f32> {
        let FrozenSaved { x, rstd, .. } = saved;
        match self {
            Self::Plain => dinput.into_owned(),
            Self::Normed { weight, .. } => time(Part::Norm, || {
                // SAFETY: `x` and `dinput` have a row for each of `rstd`, by the checks of `backward`; all of the gradient
                // is written.
                unsafe {
                    written(dinput.len(), |dx| {
                        norm::input_gradient(x, weight, rstd, &dinput, dx);
                    })
                }
            }),
            Self::Gated => time(Part::Swiglu, || {
                // SAFETY: `x` is twice as long as `dinput`, by the checks of `backward`; all of the gradient is written.
                unsafe {
                    written(x.len(), |dx| {
                        swiglu::joined_gradient(x, inputs, &dinput, dx);
                    })
                }
            }),
        }
    }
}
