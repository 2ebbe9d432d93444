//! A layer's gated perceptron with frozen weights, its norm before it and the residual sum after it.
//!
//! ```text
//! n = norm(x),  g = n W_gᵀ + …,  u = n W_uᵀ + …,  y = x + (silu(g)·u) W_dᵀ + …
//! ```
//!
//! With bf16 operands the rows go through in blocks that stay in the second-level cache (`mlp_blocks.rs`), and what the
//! backward pass needs of `g` and `u` is kept in bf16. Elsewhere it is [`FrozenGroup`] twice.

use super::{
    FrozenGradients, FrozenGroup, FrozenOutputs, FrozenSaved, FrozenWanted, Group, Prologue,
};
use crate::columns::add_into;
use crate::parallel::{check_len, check_matrix};

const NO_PERCEPTRON: &str = "the groups are not those of a gated perceptron";

/// The two groups of a gated perceptron.
#[derive(Clone, Copy, Debug)]
pub struct FrozenMlp<'a> {
    /// Behind a norm, two layers of as many outputs: the gates and the ups.
    pub gate_up: FrozenGroup<'a>,
    /// Gated, one layer with as many outputs as the norm is wide.
    pub down: FrozenGroup<'a>,
}

/// What [`FrozenMlp::forward`] returns.
#[derive(Clone, Debug)]
pub struct MlpOutputs {
    /// `[rows, hidden]`.
    pub y: Vec<f32>,
    /// For the backward pass, if it was to be kept.
    pub saved: Option<MlpSaved>,
}

/// What [`FrozenMlp::backward`] needs of the forward pass besides its input.
#[derive(Clone, Debug)]
pub struct MlpSaved {
    pub(super) rstd: Vec<f32>,
    pub(super) joined: Joined,
    /// The updates' `s·n Aᵀ`, `[rows, ranks]`.
    pub(super) gate_up_h: Vec<f32>,
    pub(super) down_h: Vec<f32>,
}

/// Gates and ups.
#[derive(Clone, Debug)]
pub(super) enum Joined {
    /// `[rows, 2 * inner]`.
    F32(Vec<f32>),
    /// As `mlp_blocks.rs` lays them out.
    #[cfg(target_arch = "x86_64")]
    Bf16(Vec<f32>),
}

/// Which gradients of [`FrozenMlp`] are wanted: the others are not computed.
#[derive(Clone, Copy, Debug)]
pub struct MlpWanted {
    /// Of the input.
    pub x: bool,
    /// Of the gates' and ups' [`LowRankUpdate::a`](super::LowRankUpdate::a).
    pub gate_up_a: bool,
    /// Of their [`LowRankUpdate::b`](super::LowRankUpdate::b).
    pub gate_up_b: bool,
    /// Of the last layer's.
    pub down_a: bool,
    /// Of the last layer's.
    pub down_b: bool,
}

/// The wanted gradients, each shaped as what it is of; those of an update only where there is one.
#[derive(Clone, Debug)]
pub struct MlpGradients {
    /// Of the input, through the residual sum as well.
    pub x: Option<Vec<f32>>,
    /// Of the gates' and ups' [`LowRankUpdate::a`](super::LowRankUpdate::a).
    pub gate_up_a: Option<Vec<f32>>,
    /// Of their [`LowRankUpdate::b`](super::LowRankUpdate::b).
    pub gate_up_b: Option<Vec<f32>>,
    /// Of the last layer's.
    pub down_a: Option<Vec<f32>>,
    /// Of the last layer's.
    pub down_b: Option<Vec<f32>>,
}

impl FrozenMlp<'_> {
    /// `x + down(silu(gate(norm(x)))·up(norm(x)))`; what [`FrozenMlp::backward`] needs is kept if `keep`.
    ///
    /// The output is, bit for bit, that of the two groups one after the other and a sum.
    ///
    /// # Shapes
    /// `x` is `[rows, hidden]`.
    ///
    /// # Panics
    /// If the groups are not those of a perceptron, or a slice has another length.
    #[must_use]
    pub fn forward(&self, x: &[f32], rows: usize, keep: bool) -> MlpOutputs {
        self.check();
        check_matrix("x", x, rows, self.hidden());
        #[cfg(target_arch = "x86_64")]
        if self.in_blocks() {
            return super::mlp_blocks::forward(self, x, rows, keep);
        }
        let FrozenOutputs {
            y: joined,
            h: gate_up_h,
            rstd,
        } = self.gate_up.forward(x, rows);
        let FrozenOutputs {
            mut y, h: down_h, ..
        } = self.down.forward(&joined, rows);
        add_into(&mut y, x);
        let saved = keep.then_some(MlpSaved {
            rstd,
            joined: Joined::F32(joined),
            gate_up_h,
            down_h,
        });
        MlpOutputs { y, saved }
    }

    /// The wanted gradients of [`FrozenMlp::forward`] at the upstream gradient `dout`; `x` is what that was given.
    ///
    /// # Shapes
    /// `x` and `dout` are `[rows, hidden]`.
    ///
    /// # Panics
    /// As [`FrozenMlp::forward`], or if `saved` comes from another precision or processor path.
    #[must_use]
    pub fn backward(
        &self,
        x: &[f32],
        saved: &MlpSaved,
        dout: &[f32],
        rows: usize,
        wanted: MlpWanted,
    ) -> MlpGradients {
        self.check();
        check_matrix("x", x, rows, self.hidden());
        check_matrix("dout", dout, rows, self.hidden());
        check_len("rstd", &saved.rstd, rows);
        let joined = match &saved.joined {
            Joined::F32(joined) => joined,
            #[cfg(target_arch = "x86_64")]
            Joined::Bf16(words) => {
                assert!(self.in_blocks(), "kept in bf16 by another path");
                return super::mlp_blocks::backward(self, x, saved, words, dout, rows, wanted);
            }
        };
        let of_down = FrozenSaved {
            x: joined,
            h: &saved.down_h,
            rstd: &[],
        };
        let down_wanted = FrozenWanted {
            x: wanted.inner(),
            a: wanted.down_a,
            b: wanted.down_b,
        };
        let down = self.down.backward(of_down, dout, rows, down_wanted);
        let mut gradients = MlpGradients {
            x: None,
            gate_up_a: None,
            gate_up_b: None,
            down_a: down.a,
            down_b: down.b,
        };
        let Some(djoined) = down.x else {
            return gradients;
        };
        let of_gate_up = FrozenSaved {
            x,
            h: &saved.gate_up_h,
            rstd: &saved.rstd,
        };
        let gate_up_wanted = FrozenWanted {
            x: wanted.x,
            a: wanted.gate_up_a,
            b: wanted.gate_up_b,
        };
        let FrozenGradients { x: dx, a, b } =
            self.gate_up
                .backward(of_gate_up, &djoined, rows, gate_up_wanted);
        gradients.x = dx.map(|mut dx| {
            add_into(&mut dx, dout);
            dx
        });
        (gradients.gate_up_a, gradients.gate_up_b) = (a, b);
        gradients
    }

    /// Length of an input row.
    pub(super) fn hidden(&self) -> usize {
        self.gate_up.inputs
    }

    /// Gates of a row.
    pub(super) fn inner(&self) -> usize {
        self.down.inputs
    }

    #[cfg(target_arch = "x86_64")]
    fn in_blocks(&self) -> bool {
        self.gate_up.precision == crate::matmul::Precision::Bf16 && crate::bf16::available()
    }

    /// The gain of the norm, and its `eps`.
    #[track_caller]
    pub(super) fn norm(&self) -> (&[f32], f32) {
        match self.gate_up.prologue {
            Prologue::Normed { weight, eps } => (weight, eps),
            _ => panic!("{NO_PERCEPTRON}"),
        }
    }

    #[track_caller]
    fn check(&self) {
        let (hidden, inner) = (self.hidden(), self.inner());
        let outputs = |group: &FrozenGroup<'_>| -> Vec<usize> {
            group.layers.iter().map(|layer| layer.outputs).collect()
        };
        let (gain, _) = self.norm();
        assert!(
            gain.len() == hidden
                && hidden > 0
                && matches!(self.down.prologue, Prologue::Gated)
                && outputs(&self.gate_up) == [inner; 2]
                && outputs(&self.down) == [hidden]
                && self.gate_up.precision == self.down.precision,
            "{NO_PERCEPTRON}"
        );
        // Lengths of weights and updates.
        for group in [&self.gate_up, &self.down] {
            let _ = Group::new(group.layers, 0, group.inputs, group.update);
        }
    }
}

impl MlpWanted {
    /// Whether the gradient of the gates and ups is needed.
    pub(super) fn inner(&self) -> bool {
        self.x || self.gate_up_a || self.gate_up_b
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FrozenLinear, FrozenPanels, LowRankUpdate};
    use super::*;
    use crate::matmul::Precision;
    use crate::testing::{on_each, on_threads, random};

    const ALL: MlpWanted = MlpWanted {
        x: true,
        gate_up_a: true,
        gate_up_b: true,
        down_a: true,
        down_b: true,
    };
    const BOTH: FrozenWanted = FrozenWanted {
        x: true,
        a: true,
        b: true,
    };

    #[derive(Clone, Copy, Debug)]
    struct Case {
        rows: usize,
        hidden: usize,
        inner: usize,
        /// Gate, up and down.
        adapted: [bool; 3],
        rank: usize,
        bias: bool,
        precision: Precision,
    }

    struct Data {
        x: Vec<f32>,
        dout: Vec<f32>,
        gain: Vec<f32>,
        weights: [Vec<f32>; 3],
        biases: [Vec<f32>; 3],
        panels: [FrozenPanels; 3],
        updates: [[Vec<f32>; 2]; 2],
    }

    impl Case {
        fn data(&self) -> Data {
            let &Self {
                rows,
                hidden,
                inner,
                rank,
                ..
            } = self;
            let [gate, up, down] = self.adapted.map(usize::from);
            Data {
                x: random(rows * hidden, 1),
                dout: random(rows * hidden, 2),
                gain: random(hidden, 3),
                weights: [4, 5, 6].map(|seed| random(hidden * inner, seed)),
                biases: [(inner, 7), (inner, 8), (hidden, 9)].map(|(len, seed)| random(len, seed)),
                panels: Default::default(),
                updates: [
                    [
                        random((gate + up) * rank * hidden, 10),
                        random((gate + up) * inner * rank, 11),
                    ],
                    [
                        random(down * rank * inner, 12),
                        random(down * hidden * rank, 13),
                    ],
                ],
            }
        }

        fn with<T>(&self, data: &Data, body: impl FnOnce(FrozenMlp<'_>) -> T) -> T {
            let layer = |index: usize, outputs| FrozenLinear {
                weight: Some(&data.weights[index]),
                bias: self.bias.then_some(&data.biases[index]),
                panels: &data.panels[index],
                outputs,
                adapted: self.adapted[index],
            };
            let update = |group: usize, adapted: &[bool]| {
                let [a, b] = &data.updates[group];
                adapted.contains(&true).then_some(LowRankUpdate {
                    a,
                    b,
                    rank: self.rank,
                    scale: 0.5,
                })
            };
            let layers = [layer(0, self.inner), layer(1, self.inner)];
            body(FrozenMlp {
                gate_up: FrozenGroup {
                    prologue: Prologue::Normed {
                        weight: &data.gain,
                        eps: 1e-5,
                    },
                    inputs: self.hidden,
                    layers: &layers,
                    update: update(0, &self.adapted[..2]),
                    precision: self.precision,
                },
                down: FrozenGroup {
                    prologue: Prologue::Gated,
                    inputs: self.inner,
                    layers: &[layer(2, self.hidden)],
                    update: update(1, &self.adapted[2..]),
                    precision: self.precision,
                },
            })
        }

        fn run(&self, data: &Data, wanted: MlpWanted) -> (Vec<f32>, MlpGradients) {
            self.with(data, |mlp| {
                let MlpOutputs { y, saved } = mlp.forward(&data.x, self.rows, true);
                let dropped = mlp.forward(&data.x, self.rows, false);
                assert!(dropped.saved.is_none() && dropped.y == y);
                let saved = saved.unwrap();
                let gradients = mlp.backward(&data.x, &saved, &data.dout, self.rows, wanted);
                (y, gradients)
            })
        }

        /// The two groups by themselves; what is kept between the passes is rounded where the blocks keep it rounded.
        fn by_groups(&self, data: &Data) -> (Vec<f32>, MlpGradients) {
            self.with(data, |FrozenMlp { gate_up, down }| {
                let upper = gate_up.forward(&data.x, self.rows);
                let lower = down.forward(&upper.y, self.rows);
                let add = |values: Vec<f32>, more: &[f32]| -> Vec<f32> {
                    values.iter().zip(more).map(|(a, b)| a + b).collect()
                };
                let round = |x: &f32| {
                    let bits = x.to_bits();
                    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
                };
                let rounds = self.precision == Precision::Bf16 && crate::bf16_available();
                let joined = match rounds {
                    true => upper.y.iter().map(round).collect(),
                    false => upper.y,
                };
                let saved = FrozenSaved {
                    x: &joined,
                    h: &lower.h,
                    rstd: &[],
                };
                let of_down = down.backward(saved, &data.dout, self.rows, BOTH);
                let saved = FrozenSaved {
                    x: &data.x,
                    h: &upper.h,
                    rstd: &upper.rstd,
                };
                let of_gate_up = gate_up.backward(saved, &of_down.x.unwrap(), self.rows, BOTH);
                let gradients = MlpGradients {
                    x: of_gate_up.x.map(|dx| add(dx, &data.dout)),
                    gate_up_a: of_gate_up.a,
                    gate_up_b: of_gate_up.b,
                    down_a: of_down.a,
                    down_b: of_down.b,
                };
                (add(lower.y, &data.x), gradients)
            })
        }
    }

    fn cases() -> Vec<Case> {
        let mut cases = Vec::new();
        for precision in [Precision::F32, Precision::Bf16] {
            for (rows, hidden, inner, adapted, rank, bias) in [
                (0, 8, 8, [true; 3], 2, false),
                (1, 1, 1, [true; 3], 1, true),
                (33, 48, 200, [true; 3], 16, false),
                (65, 33, 401, [false, true, true], 3, true),
                (64, 100, 96, [true, false, false], 5, false),
                (63, 40, 31, [false, false, true], 4, true),
                (130, 64, 385, [false; 3], 0, false),
            ] {
                cases.push(Case {
                    rows,
                    hidden,
                    inner,
                    adapted,
                    rank,
                    bias,
                    precision,
                });
            }
        }
        cases
    }

    fn assert_same(got: &MlpGradients, expected: &MlpGradients, case: Case) {
        assert_eq!(got.x, expected.x, "dx of {case:?}");
        assert_eq!(got.gate_up_a, expected.gate_up_a, "{case:?}");
        assert_eq!(got.gate_up_b, expected.gate_up_b, "{case:?}");
        assert_eq!(got.down_a, expected.down_a, "{case:?}");
        assert_eq!(got.down_b, expected.down_b, "{case:?}");
    }

    #[test]
    fn it_is_the_two_groups_bit_for_bit() {
        on_each(|| {
            for case in cases() {
                let data = case.data();
                let (y, gradients) = case.run(&data, ALL);
                let (expected, by_groups) = case.by_groups(&data);
                assert_eq!(y, expected, "{case:?}");
                assert_same(&gradients, &by_groups, case);
            }
        });
    }

    #[test]
    fn threads_change_no_bit() {
        on_each(|| {
            for precision in [Precision::F32, Precision::Bf16] {
                let case = Case {
                    rows: 300,
                    hidden: 96,
                    inner: 576,
                    adapted: [true; 3],
                    rank: 16,
                    bias: false,
                    precision,
                };
                let data = case.data();
                let (y, gradients) = on_threads(1, || case.run(&data, ALL));
                for threads in [2, 3, 7] {
                    let (other, others) = on_threads(threads, || case.run(&data, ALL));
                    assert_eq!(y, other);
                    assert_same(&others, &gradients, case);
                }
            }
        });
    }

    /// Weights are packed at first use: that happens before the threads part, for whoever packs waits for the others.
    #[test]
    fn many_threads_may_be_the_first() {
        on_each(|| {
            let case = Case {
                rows: 512,
                hidden: 192,
                inner: 576,
                adapted: [true; 3],
                rank: 4,
                bias: false,
                precision: Precision::Bf16,
            };
            let expected = on_threads(1, || case.run(&case.data(), ALL).0);
            for threads in [2, 3, 8] {
                for _ in 0..20 {
                    let data = case.data();
                    let (y, _) = on_threads(threads, || case.run(&data, ALL));
                    assert_eq!(y, expected);
                }
            }
        });
    }

    #[test]
    fn what_is_not_asked_for_is_not_there_and_the_rest_is_the_same() {
        on_each(|| {
            for case in cases().into_iter().filter(|case| case.adapted[2]) {
                let data = case.data();
                let (_, all) = case.run(&data, ALL);
                let none = MlpWanted {
                    x: false,
                    gate_up_a: false,
                    gate_up_b: false,
                    down_a: false,
                    down_b: false,
                };
                let (_, got) = case.run(
                    &data,
                    MlpWanted {
                        down_a: true,
                        ..none
                    },
                );
                assert!(got.x.is_none() && got.gate_up_a.is_none() && got.down_b.is_none());
                assert_eq!(got.down_a, all.down_a, "{case:?}");
                let (_, got) = case.run(&data, MlpWanted { x: true, ..none });
                assert!(got.gate_up_b.is_none() && got.down_a.is_none());
                assert_eq!(got.x, all.x, "{case:?}");
                let (_, got) = case.run(
                    &data,
                    MlpWanted {
                        gate_up_b: true,
                        down_b: true,
                        ..none
                    },
                );
                assert!(got.x.is_none() && got.gate_up_a.is_none());
                assert_eq!(
                    (got.gate_up_b, got.down_b),
                    (all.gate_up_b, all.down_b),
                    "{case:?}"
                );
            }
        });
    }

    #[test]
    #[should_panic(expected = "the groups are not those of a gated perceptron")]
    fn another_shape_of_groups_is_refused() {
        let case = cases()[2];
        let data = case.data();
        case.with(&data, |FrozenMlp { gate_up, .. }| {
            let swapped = FrozenMlp {
                gate_up,
                down: gate_up,
            };
            swapped.forward(&data.x, case.rows, false)
        });
    }
}
