//! The laws of the cut rules (METHOD, section 4), over signals that hit thresholds exactly and tie often.

use pivotal_core::{Sign, random_stream};
use pivotal_credit::{
    Between, Credit, CreditConfig, CutRule, Cutter, EntropyCutter, FixedCutter, ImprobableCutter,
    JumpCutter, Neutral, OffsetCutter, PunctuationCutter, Response, SchmittTrigger, Score, Segment,
    TokenColumns, jump_mask, mark_cuts, merge_short, schmitt_mask, segments_from_cuts,
};
use proptest::prelude::*;
use rand::Rng;

/// Tokens of the longest signal: the fast masks read words of 64.
const LONGEST: usize = 200;

/// Quarters in −2..2: every sum and product below is exact in f32.
fn signal() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(
        (-8..=8_i8).prop_map(|quarters| f32::from(quarters) / 4.0),
        0..=LONGEST,
    )
}

fn quarters(range: std::ops::RangeInclusive<i8>) -> impl Strategy<Value = f32> {
    range.prop_map(|quarters| f32::from(quarters) / 4.0)
}

fn between() -> impl Strategy<Value = Between> {
    prop::sample::select(Between::ALL)
}

fn sign() -> impl Strategy<Value = Sign> {
    prop::sample::select(&[Sign::Negative, Sign::Neutral, Sign::Positive][..])
}

fn states(signal: &[f32], baseline: f32, offset: f32, between: Between) -> Vec<Sign> {
    let mut trigger = SchmittTrigger::new(baseline, offset, between);
    signal.iter().map(|&reward| trigger.push(reward)).collect()
}

fn flips(states: &[Sign]) -> usize {
    let signed: Vec<Sign> = states
        .iter()
        .copied()
        .filter(|&s| s != Sign::Neutral)
        .collect();
    signed.windows(2).filter(|pair| pair[0] != pair[1]).count()
}

fn config(cut: CutRule) -> CreditConfig {
    CreditConfig {
        cut,
        cut_tokens: (cut == CutRule::Fixed).then_some(3),
        jump: (cut == CutRule::Jump).then_some(1.0),
        cut_entropy_nats: (cut == CutRule::Entropy).then_some(0.5),
        offset: Some(0.5),
        ..CreditConfig::default()
    }
}

proptest! {
    #[test]
    fn detail_26_hysteresis_never_flips_more_than_no_offset(
        signal in signal(), baseline in quarters(-4..=4), offset in quarters(0..=6)
    ) {
        let wide = states(&signal, baseline, offset, Between::Hold);
        let bare = states(&signal, baseline, 0.0, Between::Hold);
        prop_assert!(flips(&wide) <= flips(&bare));
    }

    #[test]
    fn hysteresis_has_one_neutral_run_and_it_leads(
        signal in signal(), baseline in quarters(-4..=4), offset in quarters(0..=6)
    ) {
        let states = states(&signal, baseline, offset, Between::Hold);
        let lead = states.iter().take_while(|&&state| state == Sign::Neutral).count();
        prop_assert!(states[lead..].iter().all(|&state| state != Sign::Neutral));
    }

    #[test]
    fn detail_26_idempotent_on_its_own_output(
        signal in signal(), baseline in quarters(-4..=4), offset in quarters(0..=6), between in between()
    ) {
        let once = states(&signal, baseline, offset, between);
        let output: Vec<f32> = once.iter().map(|state| f32::from(state.as_i8())).collect();
        prop_assert_eq!(states(&output, 0.0, 0.5, between), once);
    }

    #[test]
    fn invariant_under_affine_maps(
        signal in signal(), baseline in quarters(-4..=4), offset in quarters(0..=6), between in between(),
        scale in prop::sample::select(&[0.25_f32, 0.5, 2.0, 8.0][..]), shift in quarters(-8..=8)
    ) {
        let mapped: Vec<f32> = signal.iter().map(|reward| scale * reward + shift).collect();
        prop_assert_eq!(
            states(&mapped, scale * baseline + shift, scale * offset, between),
            states(&signal, baseline, offset, between)
        );
    }

    #[test]
    fn a_dead_zone_forgets(signal in signal(), baseline in quarters(-4..=4), offset in quarters(0..=6)) {
        let states = states(&signal, baseline, offset, Between::Neutral);
        for (&reward, state) in signal.iter().zip(states) {
            prop_assert_eq!(state, Sign::of(reward, baseline, offset));
        }
    }

    #[test]
    fn detail_26_segments_tile_under_every_rule(
        signal in signal(), sign in sign(), min_len in 1..6_usize, seed in any::<u64>(),
        own in prop::collection::vec(any::<bool>(), LONGEST),
    ) {
        let tokens = signal.len();
        let texts: Vec<&str> = (0..tokens).map(|t| if (seed >> (t % 64)) & 1 == 1 { "x." } else { "y" }).collect();
        let cuts: Vec<usize> = (1..tokens).filter(|t| (seed >> (t % 61)) & 1 == 1).collect();
        for &cut in CutRule::ALL {
            let rule = CreditConfig { min_len, ..config(cut) }.resolve().unwrap();
            for mask in [None, Some(&own[..tokens])] {
                let response = Response {
                    texts: Some(&texts), cuts: Some(&cuts), response_mask: mask,
                    columns: TokenColumns {
                        reference_entropies: Some(&signal), old_token_logps: Some(&signal), ..TokenColumns::default()
                    },
                    ..Response::new(1, 0, &signal, sign)
                };
                let given = Credit::new(rule.clone(), 1).assign(&[response]).unwrap().remove(0);
                let mut end = 0;
                for (index, segment) in given.segments.iter().enumerate() {
                    prop_assert_eq!(segment.start, end, "{}", cut);
                    prop_assert!(segment.end > segment.start);
                    if mask.is_none() && index > 0 {
                        prop_assert!(segment.end - segment.start >= min_len, "{cut}: {segment:?}");
                    }
                    end = segment.end;
                }
                prop_assert_eq!(end, tokens);
                prop_assert_eq!(given.keep.len(), tokens);
                if let Some(mask) = mask {
                    prop_assert!(given.keep.as_slice().iter().zip(mask).all(|(&keep, &own)| own || !keep));
                }
            }
        }
    }

    #[test]
    fn streaming_is_batch(signal in signal(), between in between(), seed in any::<u64>()) {
        let tokens = signal.len();
        let texts: Vec<&str> = (0..tokens).map(|t| if (seed >> (t % 64)) & 1 == 1 { "é!" } else { "" }).collect();
        let offsets: Vec<usize> = (0..tokens).filter(|t| (seed >> (t % 61)) & 1 == 1).collect();
        let cutters = [
            Cutter::sequence(),
            Cutter::Token,
            Cutter::Fixed(FixedCutter::new(4)),
            Cutter::Punctuation(PunctuationCutter::new(".!")),
            Cutter::Jump(JumpCutter::new(0.75)),
            Cutter::schmitt(SchmittTrigger::new(0.25, 0.5, between)),
            Cutter::Entropy(EntropyCutter::new(&signal, 0.5)),
            Cutter::Improbable(ImprobableCutter::new(&signal, 0.5, 3)),
            Cutter::External(OffsetCutter::new(&offsets)),
        ];
        for cutter in cutters {
            let mut batch = vec![false; tokens];
            mark_cuts(cutter, &signal, &texts, &mut batch);
            let mut one_by_one = cutter;
            let streamed: Vec<bool> =
                signal.iter().zip(&texts).map(|(&reward, text)| one_by_one.push(reward, text)).collect();
            prop_assert_eq!(&streamed, &batch, "{:?}", cutter);
            prop_assert_eq!(batch.first().copied().unwrap_or(true), true, "{:?}", cutter);
        }
    }

    #[test]
    fn the_fast_paths_are_the_front_door(
        signal in signal(), baseline in quarters(-2..=2), offset in quarters(0..=4), sign in sign(),
        between in between(), neutral in prop::sample::select(Neutral::ALL), score in prop::sample::select(Score::ALL),
    ) {
        let common = CreditConfig {
            baseline_value: Some(baseline), offset: Some(offset), neutral, score, ..CreditConfig::default()
        };
        let slow = |config: CreditConfig| {
            let rule = config.resolve().unwrap();
            Credit::new(rule, 1).assign(&[Response::new(1, 0, &signal, sign)]).unwrap().remove(0).keep
        };
        let mut keep = vec![false; signal.len()];
        schmitt_mask(&signal, SchmittTrigger::new(baseline, offset, between), sign, neutral, &mut keep);
        let schmitt = CreditConfig { between: Some(between), ..common.clone() };
        let expected = slow(schmitt);
        prop_assert_eq!(&keep[..], expected.as_slice());

        jump_mask(&signal, 0.75, (baseline, offset), score, sign, neutral, &mut keep);
        let jump = CreditConfig { cut: CutRule::Jump, jump: Some(0.75), ..common };
        let expected = slow(jump);
        prop_assert_eq!(&keep[..], expected.as_slice());
    }

    #[test]
    fn merging_leaves_nothing_short_but_the_first(cuts in prop::collection::vec(any::<bool>(), 0..60), min_len in 1..8_usize) {
        let mut segments = segments_from_cuts(&cuts);
        let before = segments.clone();
        merge_short(&mut segments, None, min_len);
        prop_assert!(segments.iter().skip(1).all(|segment| segment.tokens() >= min_len));
        // Merging only removes pivots.
        prop_assert!(segments.iter().all(|segment| before.iter().any(|old| old.start == segment.start)));
        let mut again: Vec<Segment> = segments.clone();
        merge_short(&mut again, None, min_len);
        prop_assert_eq!(again, segments);
    }

    #[test]
    fn sums_and_means_are_conserved(signal in signal(), cuts in prop::collection::vec(any::<bool>(), LONGEST)) {
        let total = Score::Sum.of(&signal);
        let parts: f32 = segments_from_cuts(&cuts[..signal.len()])
            .iter()
            .map(|segment| Score::Sum.of(&signal[segment.start..segment.end]))
            .sum();
        prop_assert_eq!(parts, total);
    }
}

/// Longer than any block that a fast path works in, with rare and frequent events.
#[test]
fn the_fast_paths_hold_over_long_responses() {
    let mut state = 9_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    for tokens in [63, 64, 65, 127, 128, 1_000, 10_001] {
        let signal: Vec<f32> = (0..tokens).map(|_| next()).collect();
        for offset in [0.0, 0.5, 0.99] {
            for sign in [Sign::Negative, Sign::Neutral, Sign::Positive] {
                let states = states(&signal, 0.0, offset, Between::Hold);
                let expected: Vec<bool> = states
                    .iter()
                    .map(|&state| state == sign && sign != Sign::Neutral)
                    .collect();
                let mut keep = vec![true; tokens];
                let trigger = SchmittTrigger::new(0.0, offset, Between::Hold);
                schmitt_mask(&signal, trigger, sign, Neutral::Drop, &mut keep);
                assert_eq!(keep, expected, "{tokens} tokens, offset {offset}, {sign:?}");
            }
        }
    }
}

/// Many short segments, few long ones, and words of both kinds side by side.
#[test]
fn the_fast_jump_mask_holds_over_long_responses() {
    let mut random = random_stream(7, "jumps");
    for (round, tokens) in [63, 64, 66, 67, 68, 128, 131, 132, 1_000, 10_001]
        .into_iter()
        .cycle()
        .take(300)
        .enumerate()
    {
        let mut rate = 2;
        let mut level = 0.7_f32;
        let signal: Vec<f32> = (0..tokens)
            .map(|token| {
                if token % 50 == 0 {
                    rate = [1, 2, 3, 5, 40][random.next_u32() as usize % 5];
                }
                if random.next_u32().is_multiple_of(rate) {
                    level = -level;
                }
                level + (random.next_u32() >> 8) as f32 / (1 << 24) as f32 * 0.4
            })
            .collect();
        let score = Score::ALL[round % Score::ALL.len()];
        let neutral = Neutral::ALL[round / 4 % Neutral::ALL.len()];
        for sign in [Sign::Negative, Sign::Neutral, Sign::Positive] {
            let config = CreditConfig {
                baseline_value: Some(0.1),
                offset: Some(0.3),
                cut: CutRule::Jump,
                jump: Some(1.0),
                score,
                neutral,
                ..CreditConfig::default()
            };
            let mut credit = Credit::new(config.resolve().unwrap(), 1);
            let expected = credit
                .assign(&[Response::new(1, 0, &signal, sign)])
                .unwrap()
                .remove(0)
                .keep;
            let mut keep = vec![true; tokens];
            jump_mask(&signal, 1.0, (0.1, 0.3), score, sign, neutral, &mut keep);
            assert_eq!(
                &keep[..],
                expected.as_slice(),
                "{tokens} tokens, {score:?}, {sign:?}"
            );
        }
    }
}

#[test]
fn words_of_the_fast_jumps_end_anywhere() {
    let rule = CreditConfig {
        baseline_value: Some(0.25),
        ..config(CutRule::Jump)
    };
    let mut credit = Credit::new(rule.resolve().unwrap(), 1);
    let mut random = random_stream(1, "words");
    for tokens in (1..=132).flat_map(|tokens| [tokens; 50]) {
        let mut quarter = || (random.next_u32() % 17) as f32 / 4.0 - 2.0;
        let signal: Vec<f32> = (0..tokens).map(|_| quarter()).collect();
        let response = Response::new(1, 0, &signal, Sign::Positive);
        let expected = credit.assign(&[response]).unwrap().remove(0).keep;
        let mut keep = vec![false; tokens];
        let (score, neutral) = (Score::Mean, Neutral::Drop);
        jump_mask(
            &signal,
            1.0,
            (0.25, 0.5),
            score,
            Sign::Positive,
            neutral,
            &mut keep,
        );
        assert_eq!(&keep[..], expected.as_slice(), "{signal:?}");
    }
}
