//! A frozen layer's perceptron at SmolLM2-135M's shape with bf16 operands: `items` are the operations of its three products, so items
//! a second are to be compared with a core's, or all cores', rate of products. What is returned is dropped at once, as in a step, so
//! that its memory is there for the next one: new pages take longer than the work.

use divan::Bencher;
use divan::counter::ItemsCount;
use pivotal_kernels::{
    FrozenGroup, FrozenLinear, FrozenMlp, FrozenPanels, LowRankUpdate, MlpWanted, Precision,
    Prologue, add_into,
};

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const RANK: usize = 16;
/// Rows of four short responses, of four preference pairs, and of a scoring pass.
const ROWS: [usize; 3] = [604, 1056, 4096];

fn main() {
    divan::main();
}

/// Numbers in -0.5..0.5, without a period that a product could meet again.
fn values(len: usize) -> Vec<f32> {
    let mut state = len as u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}

/// The same, so small that gates stay where a model's are: far from the smallest floats, which take much longer.
fn weights(len: usize) -> Vec<f32> {
    values(len).into_iter().map(|value| value / 10.0).collect()
}

/// Calls `body` with a perceptron that has adapters everywhere, or nowhere.
fn with_mlp(adapted: bool, body: impl FnOnce(FrozenMlp<'_>)) {
    let matrices = [(); 3].map(|()| weights(HIDDEN * INNER));
    let panels: [FrozenPanels; 3] = Default::default();
    let gain = vec![1.0; HIDDEN];
    let factors = [
        2 * RANK * HIDDEN,
        2 * INNER * RANK,
        RANK * INNER,
        HIDDEN * RANK,
    ]
    .map(weights);
    let layer = |index: usize, outputs| FrozenLinear {
        weight: Some(&matrices[index]),
        bias: None,
        panels: &panels[index],
        outputs,
        adapted,
    };
    let update = |first: usize| {
        adapted.then_some(LowRankUpdate {
            a: &factors[first],
            b: &factors[first + 1],
            rank: RANK,
            scale: 1.0,
        })
    };
    body(FrozenMlp {
        gate_up: FrozenGroup {
            prologue: Prologue::Normed {
                weight: &gain,
                eps: 1e-5,
            },
            inputs: HIDDEN,
            layers: &[layer(0, INNER), layer(1, INNER)],
            update: update(0),
            precision: Precision::Bf16,
        },
        down: FrozenGroup {
            prologue: Prologue::Gated,
            inputs: INNER,
            layers: &[layer(2, HIDDEN)],
            update: update(2),
            precision: Precision::Bf16,
        },
    });
}

fn operations(rows: usize) -> ItemsCount {
    ItemsCount::new(6 * rows * HIDDEN * INNER)
}

/// As in scoring: no adapters, nothing kept.
#[divan::bench(args = ROWS)]
fn forward(bencher: Bencher, rows: usize) {
    let x = values(rows * HIDDEN);
    with_mlp(false, |mlp| {
        bencher
            .counter(operations(rows))
            .bench_local(|| drop(mlp.forward(&x, rows, false)));
    });
}

/// The same by its two groups and a sum, all rows at once: what the blocks save.
#[divan::bench(args = ROWS)]
fn forward_by_groups(bencher: Bencher, rows: usize) {
    let x = values(rows * HIDDEN);
    with_mlp(false, |FrozenMlp { gate_up, down }| {
        bencher.counter(operations(rows)).bench_local(|| {
            let mut y = down.forward(&gate_up.forward(&x, rows).y, rows).y;
            add_into(&mut y, &x);
        });
    });
}

/// As in a step of training.
#[divan::bench(args = ROWS)]
fn forward_kept(bencher: Bencher, rows: usize) {
    let x = values(rows * HIDDEN);
    with_mlp(true, |mlp| {
        bencher
            .counter(operations(rows))
            .bench_local(|| drop(mlp.forward(&x, rows, true)));
    });
}

/// With adapters (1) and without (0).
#[divan::bench(args = ROWS, consts = [0, 1])]
fn gradient<const ADAPTED: usize>(bencher: Bencher, rows: usize) {
    let x = values(rows * HIDDEN);
    let adapted = ADAPTED == 1;
    let wanted = MlpWanted {
        x: true,
        gate_up_a: adapted,
        gate_up_b: adapted,
        down_a: adapted,
        down_b: adapted,
    };
    with_mlp(adapted, |mlp| {
        let outputs = mlp.forward(&x, rows, true);
        let saved = outputs.saved.expect("it was to be kept");
        bencher
            .counter(operations(rows))
            .bench_local(|| drop(mlp.backward(&x, &saved, &x, rows, wanted)));
    });
}
