//! Tokens a second from signal to keep mask, for every cut rule and from short responses to a million tokens.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use pivotal_core::{Sign, random_stream};
use pivotal_credit::{
    Between, Credit, CreditConfig, Neutral, Response, SchmittTrigger, Score, jump_mask,
    schmitt_mask,
};
use rand::Rng;

const TOKENS: [usize; 5] = [64, 1_024, 16_384, 131_072, 1_048_576];

fn main() {
    divan::main();
}

/// Noise over runs of some twenty tokens: what a token signal looks like.
fn signal(tokens: usize) -> Vec<f32> {
    let mut random = random_stream(1, "bench");
    let mut uniform = || (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
    let mut level = 0.7;
    let mut next = || {
        if uniform() < 0.05 {
            level = -level;
        }
        level + uniform() - 0.5
    };
    (0..tokens).map(|_| next()).collect()
}

#[divan::bench(args = TOKENS)]
fn schmitt_hysteresis_mask(bencher: Bencher, tokens: usize) {
    fast_schmitt(bencher, tokens, Between::Hold);
}

#[divan::bench(args = TOKENS)]
fn schmitt_dead_zone_mask(bencher: Bencher, tokens: usize) {
    fast_schmitt(bencher, tokens, Between::Neutral);
}

fn fast_schmitt(bencher: Bencher, tokens: usize, between: Between) {
    let (signal, mut keep) = (signal(tokens), vec![false; tokens]);
    let trigger = SchmittTrigger::new(0.0, 0.3, between);
    bencher.counter(ItemsCount::new(tokens)).bench_local(|| {
        schmitt_mask(
            black_box(&signal),
            trigger,
            Sign::Positive,
            Neutral::Drop,
            &mut keep,
        );
        black_box(&keep);
    });
}

#[divan::bench(args = TOKENS)]
fn jump_mask_mean(bencher: Bencher, tokens: usize) {
    fast_jump(bencher, signal(tokens));
}

/// A pivot at every second token at random: the most that the processor's branch prediction can be asked.
#[divan::bench(args = TOKENS)]
fn jump_mask_mean_dense(bencher: Bencher, tokens: usize) {
    let mut random = random_stream(1, "dense");
    let mut level = 0.7;
    let mut next = || {
        if random.next_u32() & 1 == 0 {
            level = -level;
        }
        level
    };
    fast_jump(bencher, (0..tokens).map(|_| next()).collect());
}

fn fast_jump(bencher: Bencher, signal: Vec<f32>) {
    let tokens = signal.len();
    let mut keep = vec![false; tokens];
    bencher.counter(ItemsCount::new(tokens)).bench_local(|| {
        let signal = black_box(&signal);
        jump_mask(
            signal,
            1.2,
            (0.0, 0.0),
            Score::Mean,
            Sign::Positive,
            Neutral::Drop,
            &mut keep,
        );
        black_box(&keep);
    });
}

/// The front door: everything that a recipe does for one response, segments with scores and all.
#[divan::bench(consts = TOKENS, args = ["sequence", "token", "fixed", "punctuation", "jump", "schmitt", "external"])]
fn assign<const TOKENS: usize>(bencher: Bencher, cut: &str) {
    let parameter = match cut {
        "fixed" => "cut_tokens = 16",
        "jump" => "jump = 1.2",
        "schmitt" => "offset = 0.3",
        _ => "",
    };
    let config: CreditConfig = toml::from_str(&format!("cut = '{cut}'\n{parameter}")).unwrap();
    let signal = signal(TOKENS);
    let texts: Vec<&str> = (0..TOKENS)
        .map(|t| if t % 17 == 16 { "." } else { " word" })
        .collect();
    let cuts: Vec<usize> = (0..TOKENS).step_by(19).collect();
    let response = Response {
        texts: Some(&texts),
        cuts: Some(&cuts),
        ..Response::new(1, 0, &signal, Sign::Positive)
    };
    let mut credit = Credit::new(config.resolve().unwrap(), 1);
    bencher
        .counter(ItemsCount::new(TOKENS))
        .bench_local(|| credit.assign(black_box(&[response])).unwrap());
}
