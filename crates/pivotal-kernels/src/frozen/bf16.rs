//! The products of [`super`] with bf16 operands.

use super::{
    FrozenGradients, FrozenGroup, FrozenLinear, FrozenPanels, FrozenSaved, FrozenWanted, Group,
    LowRankUpdate, Place, Prologue, scale,
};
use crate::account::time;
use crate::group::{Job, Segment, multiply_jobs, multiply_jobs_at};
use crate::matmul::Store;
use crate::panels::{
    COLUMNS, Part, Rows, Source, left_words, pack, pack_left, pack_rows, packed_words,
};
use crate::parallel::{with_scratch, written};

/// Lends `body` the operands packed as left ones, in their order.
fn with_lefts<T>(sources: &[Source<'_>], body: impl FnOnce(&[&[f32]]) -> T) -> T {
    with_packed(sources, left_words, pack_left, body)
}

/// Lends `body` the operands packed as right ones, in their order.
pub(super) fn with_rights<T>(sources: &[Source<'_>], body: impl FnOnce(&[&[f32]]) -> T) -> T {
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
pub(super) fn rows_of(
    values: &[f32],
    rows: usize,
    stride: usize,
    first: usize,
    k: usize,
) -> Source<'_> {
    Source {
        values: &values[first.min(values.len())..],
        line_stride: stride,
        k_stride: 1,
        lines: rows,
        k,
    }
}

/// Packs the products' input, made by the prologue where it does something.
fn pack_input(
    group: &FrozenGroup<'_>,
    saved: FrozenSaved<'_>,
    rows: usize,
    left: Option<&mut [f32]>,
    right: Option<&mut [f32]>,
) {
    let inputs = group.inputs;
    let part = Part {
        first: 0,
        columns: inputs,
        left,
        right,
    };
    let make = |rows: std::ops::Range<usize>, out: &mut [f32]| {
        group.prologue.make(saved.x, saved.rstd, rows, out);
    };
    let source = match group.prologue {
        Prologue::Plain => Rows::InMemory {
            values: saved.x,
            stride: inputs,
        },
        _ => Rows::Made {
            width: inputs,
            make: &make,
        },
    };
    time(group.prologue.part(), || {
        pack_rows(rows, &source, &mut [part])
    });
}

/// The outputs before their biases, and `h`.
pub(super) fn forward(
    frozen: &FrozenGroup<'_>,
    group: &Group<'_>,
    x: &[f32],
    rstd: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let &Group {
        layers,
        rows,
        inputs,
        ranks,
        ..
    } = group;
    let places = group.places();
    with_scratch(left_words(rows, inputs), |left| {
        let saved = FrozenSaved { x, h: &[], rstd };
        pack_input(frozen, saved, rows, Some(left), None);
        let left = &*left;
        let Some(update) = frozen.update else {
            let segments: Vec<_> = layers
                .iter()
                .map(|layer| [whole(left, layer, inputs)])
                .collect();
            let segments = segments.iter().map(|segments| &segments[..]);
            return (product(&jobs(layers, &places, segments), group), Vec::new());
        };
        let mut h = with_rights(&[rows_of(update.a, ranks, inputs, 0, inputs)], |a| {
            let segments = [Segment::whole(left, a[0], inputs)];
            let job = Job {
                segments: &segments,
                columns: ranks,
                out_column: 0,
            };
            fresh_product(&[job], rows, ranks)
        });
        scale(&mut h, update.scale);
        let rank = update.rank;
        let lefts: Vec<_> = places
            .iter()
            .filter_map(|place| place.update.as_ref())
            .map(|at| rows_of(&h, rows, ranks, at.rank, rank))
            .collect();
        let rights = update_sources(group, update);
        let y = with_lefts(&lefts, |lefts| {
            with_rights(&rights, |rights| {
                let mut updates = lefts.iter().zip(rights);
                let segments: Vec<Vec<_>> = layers
                    .iter()
                    .zip(&places)
                    .map(|(layer, place)| {
                        let update = place.update.as_ref().and_then(|_| updates.next());
                        let update = update.map(|(h, b)| Segment::whole(h, b, rank));
                        std::iter::once(whole(left, layer, inputs))
                            .chain(update)
                            .collect()
                    })
                    .collect();
                let segments = segments.iter().map(|segments| &segments[..]);
                product(&jobs(layers, &places, segments), group)
            })
        });
        (y, h)
    })
}

/// Each adapted layer's `B` as the right operand of `h Bᵀ`.
pub(super) fn update_sources<'a>(group: &Group<'_>, update: LowRankUpdate<'a>) -> Vec<Source<'a>> {
    let rank = update.rank;
    let both = group.layers.iter().zip(group.places());
    both.filter_map(|(layer, place)| {
        let first = place.update?.output * rank;
        Some(rows_of(update.b, layer.outputs, rank, first, rank))
    })
    .collect()
}

/// Each adapted layer's `B` as the right operand of `dy B`.
pub(super) fn hidden_sources<'a>(group: &Group<'_>, update: LowRankUpdate<'a>) -> Vec<Source<'a>> {
    let rank = update.rank;
    let both = group.layers.iter().zip(group.places());
    both.filter_map(|(layer, place)| {
        Some(Source {
            values: &update.b[place.update?.output * rank..],
            line_stride: 1,
            k_stride: rank,
            lines: rank,
            k: layer.outputs,
        })
    })
    .collect()
}

/// The outputs of all layers.
fn product(jobs: &[Job<'_>], group: &Group<'_>) -> Vec<f32> {
    fresh_product(jobs, group.rows, group.outputs)
}

/// The product of jobs whose columns are all of a row's `columns`.
fn fresh_product(jobs: &[Job<'_>], rows: usize, columns: usize) -> Vec<f32> {
    let covered: usize = jobs.iter().map(|job| job.columns).sum();
    assert_eq!(covered, columns, "the jobs are not whole rows");
    // SAFETY: the jobs' columns do not overlap and are as many as a row has, so every element is written.
    unsafe {
        written(rows * columns, |out| {
            multiply_jobs_at(jobs, rows, out, columns, Store::Replace);
        })
    }
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
    frozen: &FrozenGroup<'_>,
    group: &Group<'_>,
    saved: FrozenSaved<'_>,
    dout: &[f32],
    wanted: FrozenWanted,
) -> FrozenGradients {
    let &Group {
        layers,
        rows,
        outputs,
        ranks,
        ..
    } = group;
    let places = group.places();
    let left = |layer: &FrozenLinear<'_>| left_words(rows, layer.outputs);
    let right = |layer: &FrozenLinear<'_>, place: &Place| match place.update {
        Some(_) if wanted.b => packed_words::<COLUMNS>(layer.outputs, rows),
        _ => 0,
    };
    let both = layers.iter().zip(&places);
    let words = both
        .clone()
        .map(|(layer, place)| left(layer) + right(layer, place));
    with_scratch(words.sum(), |mut rest| {
        let mut parts = Vec::with_capacity(layers.len());
        for (layer, place) in both {
            let (lefts, after) = rest.split_at_mut(left(layer));
            let (rights, after) = after.split_at_mut(right(layer, place));
            rest = after;
            parts.push(Part {
                first: place.first,
                columns: layer.outputs,
                left: Some(lefts),
                right: (!rights.is_empty()).then_some(rights),
            });
        }
        let source = Rows::InMemory {
            values: dout,
            stride: outputs,
        };
        pack_rows(rows, &source, &mut parts);
        let lefts: Vec<&[f32]> = parts
            .iter()
            .filter_map(|part| part.left.as_deref())
            .collect();
        let rights: Vec<&[f32]> = parts
            .iter()
            .map(|part| part.right.as_deref().unwrap_or_default())
            .collect();
        let Some(update) = frozen.update else {
            let x = wanted
                .x
                .then(|| input_gradient(frozen, group, saved, &lefts, None));
            return FrozenGradients {
                x,
                a: None,
                b: None,
            };
        };
        with_scratch(rows * ranks, |dh| {
            if wanted.x || wanted.a {
                hidden_gradient(group, &places, &lefts, update, dh);
            }
            FrozenGradients {
                x: wanted
                    .x
                    .then(|| input_gradient(frozen, group, saved, &lefts, Some((update, &*dh)))),
                a: wanted.a.then(|| down_gradient(frozen, group, saved, dh)),
                b: wanted
                    .b
                    .then(|| up_gradient(group, &places, update, saved.h, &rights)),
            }
        })
    })
}

/// `dx = Σ_i dy_i W_i + dh_i A_i`, and then what the prologue makes of it; `update` comes with `dh`.
fn input_gradient(
    frozen: &FrozenGroup<'_>,
    group: &Group<'_>,
    saved: FrozenSaved<'_>,
    lefts: &[&[f32]],
    update: Option<(LowRankUpdate<'_>, &[f32])>,
) -> Vec<f32> {
    let &Group {
        layers,
        rows,
        inputs,
        ranks,
        ..
    } = group;
    let segments: Vec<_> = layers
        .iter()
        .zip(lefts)
        .map(|(layer, left)| {
            Segment::whole(left, layer.panels.backward(layer, inputs), layer.outputs)
        })
        .collect();
    let multiply = |segments: &[Segment<'_>]| {
        let job = Job {
            segments,
            columns: inputs,
            out_column: 0,
        };
        if let Prologue::Plain = frozen.prologue {
            return fresh_product(&[job], rows, inputs);
        }
        with_scratch(rows * inputs, |dinput| {
            multiply_jobs(&[job], rows, dinput, inputs, Store::Replace);
            frozen.prologue.gradient(saved, inputs, (&*dinput).into())
        })
    };
    let Some((update, dh)) = update else {
        return multiply(&segments);
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
            multiply(&segments)
        })
    })
}

/// `dA = dhᵀ x`, of all layers.
fn down_gradient(
    frozen: &FrozenGroup<'_>,
    group: &Group<'_>,
    saved: FrozenSaved<'_>,
    dh: &[f32],
) -> Vec<f32> {
    let &Group { rows, inputs, .. } = group;
    with_scratch(packed_words::<COLUMNS>(inputs, rows), |right| {
        pack_input(frozen, saved, rows, None, Some(right));
        down_product(group, right, dh)
    })
}

/// `dhᵀ x`, `right` being the packed `x`.
pub(super) fn down_product(group: &Group<'_>, right: &[f32], dh: &[f32]) -> Vec<f32> {
    let &Group {
        rows,
        inputs,
        ranks,
        ..
    } = group;
    let left = Source {
        values: dh,
        line_stride: 1,
        k_stride: ranks,
        lines: ranks,
        k: rows,
    };
    with_lefts(&[left], |left| {
        let segments = [Segment::whole(left[0], right, rows)];
        let job = Job {
            segments: &segments,
            columns: inputs,
            out_column: 0,
        };
        fresh_product(&[job], ranks, inputs)
    })
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
    let sources = hidden_sources(group, update);
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

/// `dB_i = dy_iᵀ h_i`, of all layers; `rights` are the packed `dy_i`. The few columns of `h` stand on the left, where a panel is
/// narrower than on the right, so it is `dB_iᵀ` that comes out.
pub(super) fn up_gradient(
    group: &Group<'_>,
    places: &[Place],
    update: LowRankUpdate<'_>,
    h: &[f32],
    rights: &[&[f32]],
) -> Vec<f32> {
    let &Group {
        layers,
        rows,
        ranks,
        ..
    } = group;
    let rank = update.rank;
    let mut db = vec![0.0; update.b.len()];
    for ((layer, place), right) in layers.iter().zip(places).zip(rights) {
        let Some(at) = &place.update else { continue };
        let left = Source {
            values: &h[at.rank.min(h.len())..],
            line_stride: 1,
            k_stride: ranks,
            lines: rank,
            k: rows,
        };
        with_lefts(&[left], |left| {
            let segments = [Segment::whole(left[0], right, rows)];
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
    }
    db
}
