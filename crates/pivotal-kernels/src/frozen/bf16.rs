//! The products of [`super`] with bf16 operands.

use super::{FrozenGradients, FrozenLinear, FrozenPanels, Group, LowRankUpdate, Place, scale};
use crate::group::{Job, Segment, multiply_jobs};
use crate::matmul::{Precision, ProductShape, Store, matmul_tn};
use crate::panels::{COLUMNS, Source, left_words, pack, pack_left, packed_words};
use crate::parallel::{AlignedFloats, with_scratch};

impl FrozenPanels {
    /// The weight's rows as columns of the right operand: `x Wᵀ`.
    pub(crate) fn forward(&self, layer: &FrozenLinear<'_>, inputs: usize) -> &[f32] {
        let panels = self.forward.get_or_init(|| {
            packed::<COLUMNS>(Source {
                values: layer.weight,
                line_stride: inputs,
                k_stride: 1,
                lines: layer.outputs,
                k: inputs,
            })
        });
        panels.as_slice()
    }

    /// The weight itself as the right operand: `dy W`.
    pub(crate) fn backward(&self, layer: &FrozenLinear<'_>, inputs: usize) -> &[f32] {
        let panels = self.backward.get_or_init(|| {
            packed::<COLUMNS>(Source {
                values: layer.weight,
                line_stride: 1,
                k_stride: inputs,
                lines: inputs,
                k: layer.outputs,
            })
        });
        panels.as_slice()
    }
}

fn packed<const W: usize>(source: Source<'_>) -> AlignedFloats {
    let mut words = AlignedFloats::zeroed(packed_words::<W>(source.lines, source.k));
    pack::<W>(source, words.as_mut_slice());
    words
}

/// Lends `body` the operands packed as left ones, in their order.
fn with_lefts<T>(sources: &[Source<'_>], body: impl FnOnce(&[&[f32]]) -> T) -> T {
    with_packed(sources, left_words, pack_left, body)
}

/// Lends `body` the operands packed as right ones, in their order.
fn with_rights<T>(sources: &[Source<'_>], body: impl FnOnce(&[&[f32]]) -> T) -> T {
    with_packed(sources, packed_words::<COLUMNS>, pack::<COLUMNS>, body)
}

fn with_packed<T>(
    sources: &[Source<'_>],
    words: impl Fn(usize, usize) -> usize,
    pack: impl Fn(Source<'_>, &mut [f32]),
    body: impl FnOnce(&[&[f32]]) -> T,
) -> T {
    let words = |source: &Source<'_>| words(source.lines, source.k);
    with_scratch(sources.iter().map(words).sum(), |mut rest| {
        let mut packs: Vec<&[f32]> = Vec::with_capacity(sources.len());
        for &source in sources {
            let (words, after) = rest.split_at_mut(words(&source));
            pack(source, words);
            packs.push(words);
            rest = after;
        }
        body(&packs)
    })
}

/// Columns `first..` of rows that are `stride` long, `k` of them summed over.
fn rows_of(values: &[f32], rows: usize, stride: usize, first: usize, k: usize) -> Source<'_> {
    Source {
        values: &values[first.min(values.len())..],
        line_stride: stride,
        k_stride: 1,
        lines: rows,
        k,
    }
}

pub(super) fn forward(
    group: &Group<'_>,
    x: &[f32],
    update: Option<LowRankUpdate<'_>>,
    out: &mut [f32],
    h: &mut [f32],
) {
    let &Group {
        layers,
        rows,
        inputs,
        outputs,
        ranks,
    } = group;
    let places = group.places();
    with_lefts(&[rows_of(x, rows, inputs, 0, inputs)], |left| {
        let Some(update) = update else {
            let segments: Vec<_> = layers
                .iter()
                .map(|layer| [whole(left[0], layer, inputs)])
                .collect();
            let jobs = jobs(
                layers,
                &places,
                segments.iter().map(|segments| &segments[..]),
            );
            return multiply_jobs(&jobs, rows, out, outputs, Store::Replace);
        };
        with_rights(&[rows_of(update.a, ranks, inputs, 0, inputs)], |a| {
            let segments = [Segment::whole(left[0], a[0], inputs)];
            let job = Job {
                segments: &segments,
                columns: ranks,
                out_column: 0,
            };
            multiply_jobs(&[job], rows, h, ranks, Store::Replace);
        });
        scale(h, update.scale);
        let rank = update.rank;
        let mut lefts = Vec::new();
        let mut rights = Vec::new();
        for (layer, place) in layers.iter().zip(&places) {
            if let Some(at) = &place.update {
                lefts.push(rows_of(h, rows, ranks, at.rank, rank));
                rights.push(rows_of(
                    update.b,
                    layer.outputs,
                    rank,
                    at.output * rank,
                    rank,
                ));
            }
        }
        with_lefts(&lefts, |lefts| {
            with_rights(&rights, |rights| {
                let mut updates = lefts.iter().zip(rights);
                let segments: Vec<Vec<_>> = layers
                    .iter()
                    .zip(&places)
                    .map(|(layer, place)| {
                        let update = place.update.as_ref().and_then(|_| updates.next());
                        let update = update.map(|(h, b)| Segment::whole(h, b, rank));
                        std::iter::once(whole(left[0], layer, inputs))
                            .chain(update)
                            .collect()
                    })
                    .collect();
                let jobs = jobs(
                    layers,
                    &places,
                    segments.iter().map(|segments| &segments[..]),
                );
                multiply_jobs(&jobs, rows, out, outputs, Store::Replace);
            });
        });
    });
}

/// `x Wᵀ` of one layer, `left` being the packed input.
fn whole<'a>(left: &'a [f32], layer: &FrozenLinear<'a>, inputs: usize) -> Segment<'a> {
    let panels: &'a FrozenPanels = layer.panels;
    Segment::whole(left, panels.forward(layer, inputs), inputs)
}

fn jobs<'a>(
    layers: &[FrozenLinear<'_>],
    places: &[Place],
    segments: impl Iterator<Item = &'a [Segment<'a>]>,
) -> Vec<Job<'a>> {
    layers
        .iter()
        .zip(places)
        .zip(segments)
        .map(|((layer, place), segments)| Job {
            segments,
            columns: layer.outputs,
            out_column: place.first,
        })
        .collect()
}

pub(super) fn backward(
    group: &Group<'_>,
    x: &[f32],
    update: Option<LowRankUpdate<'_>>,
    h: &[f32],
    dout: &[f32],
    dh: &mut [f32],
    gradients: FrozenGradients<'_>,
) {
    let &Group {
        layers,
        rows,
        inputs,
        outputs,
        ranks,
    } = group;
    let places = group.places();
    let sources: Vec<_> = layers
        .iter()
        .zip(&places)
        .map(|(layer, place)| rows_of(dout, rows, outputs, place.first, layer.outputs))
        .collect();
    with_lefts(&sources, |lefts| {
        if let Some(update) = update {
            hidden_gradient(group, &places, lefts, update, dh);
        }
        let Some(dx) = gradients.x else { return };
        let segments: Vec<_> = layers
            .iter()
            .zip(lefts)
            .map(|(layer, left)| {
                Segment::whole(left, layer.panels.backward(layer, inputs), layer.outputs)
            })
            .collect();
        let Some(update) = update else {
            let job = Job {
                segments: &segments,
                columns: inputs,
                out_column: 0,
            };
            return multiply_jobs(&[job], rows, dx, inputs, Store::Replace);
        };
        let a = Source {
            values: update.a,
            line_stride: 1,
            k_stride: inputs,
            lines: inputs,
            k: ranks,
        };
        with_lefts(&[rows_of(dh, rows, ranks, 0, ranks)], |left| {
            with_rights(&[a], |a| {
                let last = Segment::whole(left[0], a[0], ranks);
                let segments: Vec<_> = segments.iter().copied().chain([last]).collect();
                let job = Job {
                    segments: &segments,
                    columns: inputs,
                    out_column: 0,
                };
                multiply_jobs(&[job], rows, dx, inputs, Store::Replace);
            });
        });
    });
    let Some(update) = update else { return };
    if let Some(da) = gradients.a {
        let shape = ProductShape {
            m: ranks,
            n: inputs,
            k: rows,
        };
        matmul_tn(dh, x, da, shape, Store::Replace, Precision::Bf16);
    }
    if let Some(db) = gradients.b {
        low_rank_gradient(group, &places, update, h, dout, db);
    }
}

/// `dh_i = s·dy_i B_i`, side by side.
fn hidden_gradient(
    group: &Group<'_>,
    places: &[Place],
    lefts: &[&[f32]],
    update: LowRankUpdate<'_>,
    dh: &mut [f32],
) {
    let rank = update.rank;
    let adapted = || group.layers.iter().zip(places).zip(lefts);
    let sources: Vec<_> = adapted()
        .filter_map(|((layer, place), _)| {
            place.update.as_ref().map(|at| Source {
                values: &update.b[at.output * rank..],
                line_stride: 1,
                k_stride: rank,
                lines: rank,
                k: layer.outputs,
            })
        })
        .collect();
    with_rights(&sources, |rights| {
        let mut rights = rights.iter();
        let segments: Vec<_> = adapted()
            .filter_map(|((layer, place), left)| {
                let at = place.update.as_ref()?;
                let right = rights.next()?;
                Some((at.rank, [Segment::whole(left, right, layer.outputs)]))
            })
            .collect();
        let jobs: Vec<_> = segments
            .iter()
            .map(|(first, segments)| Job {
                segments,
                columns: rank,
                out_column: *first,
            })
            .collect();
        multiply_jobs(&jobs, group.rows, dh, group.ranks, Store::Replace);
    });
    scale(dh, update.scale);
}

/// `dB_i = dy_iᵀ h_i`. The few columns of `h` stand on the left, where a panel is 8 wide and not 48, so it is `dB_iᵀ` that comes
/// out.
fn low_rank_gradient(
    group: &Group<'_>,
    places: &[Place],
    update: LowRankUpdate<'_>,
    h: &[f32],
    dout: &[f32],
    db: &mut [f32],
) {
    let &Group {
        layers,
        rows,
        outputs,
        ranks,
        ..
    } = group;
    let rank = update.rank;
    for (layer, place) in layers.iter().zip(places) {
        let Some(at) = &place.update else { continue };
        let left = Source {
            values: &h[at.rank.min(h.len())..],
            line_stride: 1,
            k_stride: ranks,
            lines: rank,
            k: rows,
        };
        let right = Source {
            values: &dout[place.first.min(dout.len())..],
            line_stride: 1,
            k_stride: outputs,
            lines: layer.outputs,
            k: rows,
        };
        with_lefts(&[left], |left| {
            with_rights(&[right], |right| {
                let segments = [Segment::whole(left[0], right[0], rows)];
                let job = Job {
                    segments: &segments,
                    columns: layer.outputs,
                    out_column: 0,
                };
                with_scratch(rank * layer.outputs, |transposed| {
                    multiply_jobs(&[job], rank, transposed, layer.outputs, Store::Replace);
                    let db = &mut db[at.output * rank..][..layer.outputs * rank];
                    for (output, row) in db.chunks_exact_mut(rank).enumerate() {
                        for (slot, value) in row.iter_mut().enumerate() {
                            *value = transposed[slot * layer.outputs + output];
                        }
                    }
                });
            });
        });
    }
}
