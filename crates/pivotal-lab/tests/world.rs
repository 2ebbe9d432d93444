//! Laws of the arithmetic world: what is right, what is wrong, how often, and which data never meet.

use std::collections::HashSet;

use pivotal_core::{Side, random_stream};
use pivotal_lab::world::WorldError;
use pivotal_lab::world::corpus::{CorpusSettings, training_batch};
use pivotal_lab::world::judge::judge;
use pivotal_lab::world::mistakes::{
    Attempt, Mistake, MistakeRates, Reach, attempt, right_response,
};
use pivotal_lab::world::pairs::{PairSettings, preference_pairs};
use pivotal_lab::world::problem::{
    Difficulty, Operation, Operator, Partition, Problem, ProblemShape,
};
use pivotal_lab::world::splits::{Split, evaluation_samples};
use pivotal_lab::world::truth::{STEP_TOKENS, Slot, label};
use pivotal_lab::world::vocabulary::{SIZE, decode, encode};
use proptest::prelude::*;

/// Mistakes in about half of the steps, of every kind.
const OFTEN: MistakeRates = MistakeRates {
    hard_permille: 500,
    severe_permille: 700,
    slip_permille: 300,
    local_permille: 500,
    follow_permille: 600,
};

fn shapes() -> impl Strategy<Value = ProblemShape> {
    (1_usize..=8, 1_u8..=99, any::<bool>()).prop_map(|(steps, largest_operand, claim)| {
        ProblemShape {
            steps,
            largest_operand,
            claim,
        }
    })
}

fn drawn(shape: ProblemShape, seed: u64, rates: &MistakeRates) -> (Problem, Attempt) {
    let mut stream = random_stream(seed, "world test");
    let problem = shape.draw(&mut stream, Partition::Training).unwrap();
    let attempt = attempt(&problem, rates, &mut stream).unwrap();
    (problem, attempt)
}

fn wrong_positions(problem: &Problem, response: &[u32]) -> Vec<usize> {
    let labels = label(problem, response);
    assert_eq!(labels.len(), response.len());
    (0..response.len())
        .filter(|&position| !labels[position].right)
        .collect()
}

proptest! {
    #[test]
    fn the_right_response_has_no_wrong_token(shape in shapes(), seed: u64) {
        let (problem, flawless) = drawn(shape, seed, &MistakeRates::NONE);
        let right = right_response(&problem);
        prop_assert_eq!(&flawless.response, &right);
        prop_assert_eq!(wrong_positions(&problem, &right), Vec::<usize>::new());
        let verdict = judge(&problem, &right);
        prop_assert!(verdict.exact && verdict.answer_right);
        prop_assert_eq!(verdict.answer, Some(problem.answer()));
        prop_assert_eq!((verdict.right_steps, verdict.wrong_tokens), (shape.steps, 0));
    }

    #[test]
    fn any_other_token_is_wrong_where_it_stands(
        shape in shapes(), seed: u64, place: prop::sample::Index, other in 1..SIZE as u32,
    ) {
        let (problem, _) = drawn(shape, seed, &MistakeRates::NONE);
        let mut response = right_response(&problem);
        let position = place.index(response.len());
        response[position] = (response[position] + other) % SIZE as u32;
        prop_assert_eq!(wrong_positions(&problem, &response)[0], position);
        let verdict = judge(&problem, &response);
        prop_assert!(!verdict.exact);
        prop_assert!(verdict.wrong_tokens >= 1);
    }

    #[test]
    fn the_wrong_tokens_of_an_attempt_are_the_digits_its_mistakes_changed(shape in shapes(), seed: u64) {
        let (problem, attempt) = drawn(shape, seed, &OFTEN);
        let mut expected = Vec::new();
        for (index, step) in attempt.steps.iter().enumerate() {
            prop_assert_eq!(step.mistake.is_some(), step.result != step.right_result);
            if step.result % 10 != step.right_result % 10 {
                expected.push(index * STEP_TOKENS + 7);
            }
            if step.result / 10 != step.right_result / 10 {
                expected.push(index * STEP_TOKENS + 8);
            }
        }
        prop_assert_eq!(wrong_positions(&problem, &attempt.response), expected);
        let verdict = judge(&problem, &attempt.response);
        prop_assert_eq!(verdict.exact, attempt.mistakes() == 0);
        prop_assert_eq!(verdict.right_steps + attempt.mistakes(), shape.steps);
    }

    #[test]
    fn righting_a_wrong_token_fixes_exactly_it(shape in shapes(), seed: u64) {
        let (problem, attempt) = drawn(shape, seed, &OFTEN);
        let wrong = wrong_positions(&problem, &attempt.response);
        for &position in &wrong {
            let step = attempt.steps[position / STEP_TOKENS];
            let digit = match position % STEP_TOKENS {
                7 => step.right_result % 10,
                _ => step.right_result / 10,
            };
            let mut response = attempt.response.clone();
            response[position] = encode(&digit.to_string()).unwrap()[0];
            let after = wrong_positions(&problem, &response);
            let before: Vec<usize> = wrong.iter().copied().filter(|&at| at != position).collect();
            let others = wrong.iter().filter(|&&at| at / STEP_TOKENS == position / STEP_TOKENS).count() > 1;
            let (_, reach) = step.mistake.unwrap();
            let last = position / STEP_TOKENS + 1 == shape.steps;
            if last || (reach == Reach::Local && !others) {
                prop_assert_eq!(after, before);
            } else {
                // What follows restates the number as it was, so only the tokens up to the next restatement are the same.
                let restated = (position / STEP_TOKENS + 1) * STEP_TOKENS;
                let up_to = |positions: &[usize]| -> Vec<usize> {
                    positions.iter().copied().filter(|&at| at < restated).collect()
                };
                prop_assert_eq!(up_to(&after), up_to(&before));
            }
        }
    }

    #[test]
    fn any_tokens_at_all_get_one_label_each(
        shape in shapes(), seed: u64, tokens in prop::collection::vec(0..SIZE as u32 + 5, 0..120),
    ) {
        let (problem, _) = drawn(shape, seed, &MistakeRates::NONE);
        let verdict = judge(&problem, &tokens);
        prop_assert_eq!(verdict.wrong_tokens, wrong_positions(&problem, &tokens).len());
        prop_assert!(verdict.right_steps <= verdict.steps);
        // Cutting never changes the truth of what stands before the cut, in whole steps.
        let cut = tokens.len() / STEP_TOKENS * STEP_TOKENS;
        prop_assert_eq!(&label(&problem, &tokens)[..cut], &label(&problem, &tokens[..cut])[..]);
    }

    #[test]
    fn problems_stay_within_two_digits_and_their_prompt_tells_them_apart(shape in shapes(), seed: u64) {
        let (problem, _) = drawn(shape, seed, &MistakeRates::NONE);
        let rebuilt = Problem::new(problem.start(), problem.operations().to_vec(), problem.claim());
        prop_assert_eq!(rebuilt.as_ref(), Ok(&problem));
        prop_assert_eq!(problem.steps(), shape.steps);
        prop_assert!(problem.operations().iter().all(|operation| operation.operand() <= shape.largest_operand));
        let claim = usize::from(shape.claim) * 3;
        prop_assert_eq!(problem.prompt().len(), 5 + 4 * shape.steps + claim);
    }
}

#[test]
fn a_forgotten_carry_is_the_tens_digit_one_off() {
    let plus = Operation::new(Operator::Plus, 16).unwrap();
    let minus = Operation::new(Operator::Minus, 27).unwrap();
    assert_eq!((plus.apply(46), plus.apply_without_carry(46)), (62, 52));
    assert_eq!((minus.apply(52), minus.apply_without_carry(52)), (25, 35));
    assert_eq!((plus.apply(99), minus.apply(5)), (15, 78));
    for left in 0..100 {
        for operand in 0..100 {
            for operator in [Operator::Plus, Operator::Minus] {
                let operation = Operation::new(operator, operand).unwrap();
                let (right, forgotten) =
                    (operation.apply(left), operation.apply_without_carry(left));
                let off = match (operation.difficulty(left), operator) {
                    (Difficulty::Easy, _) => 0,
                    (_, Operator::Plus) => 90,
                    (_, Operator::Minus) => 10,
                };
                assert_eq!((right + off) % 100, forgotten, "{left} {operation:?}");
            }
        }
    }
}

#[test]
fn the_tens_digit_must_belong_to_the_number_that_the_units_digit_fits() {
    // 44 + 6 = 50; the claim 49 is followed, so 49 and 50 may both be restated.
    let operations = vec![
        Operation::new(Operator::Plus, 6).unwrap(),
        Operation::new(Operator::Plus, 1).unwrap(),
    ];
    let problem = Problem::new(44, operations, Some(49)).unwrap();
    assert_eq!(decode(&problem.prompt()).unwrap(), "^B+60?94A+10=44;");
    let wrong_in_second_step = |step: &str| {
        let response = encode(&format!("44B+60=94;{step}")).unwrap();
        let wrong = wrong_positions(&problem, &response);
        assert_eq!(wrong[..2], [7, 8]);
        wrong[2..].to_vec()
    };
    assert!(wrong_in_second_step("94A+10=05;$").is_empty());
    assert!(wrong_in_second_step("05A+10=15;$").is_empty());
    // 40 and 59 mix the two; 38 is neither, and its tens digit fits neither.
    assert_eq!(wrong_in_second_step("04A+10=14;$"), [11]);
    assert_eq!(wrong_in_second_step("95A+10=06;$"), [11]);
    assert_eq!(wrong_in_second_step("83A+10=93;$"), [10, 11]);
    // A units digit that fits neither is wrong alone where the tens digit fits one.
    assert_eq!(wrong_in_second_step("85A+10=95;$"), [10]);
}

#[test]
fn mistakes_happen_at_their_rates() {
    let rates = MistakeRates::CORPUS;
    let mut stream = random_stream(3, "rates test");
    // Steps and forgotten carries of each difficulty; slips among steps that were not wrong already.
    let (mut steps, mut forgotten) = ([0_u32; 3], [0_u32; 3]);
    let (mut could_slip, mut slips, mut followed, mut local) = (0, 0, 0, 0);
    const PROBLEMS: u32 = 20_000;
    for index in 0..PROBLEMS {
        let shape = match index % 2 {
            0 => ProblemShape::USUAL,
            _ => ProblemShape::ADVERSARIAL,
        };
        let problem = shape.draw(&mut stream, Partition::Training).unwrap();
        for step in attempt(&problem, &rates, &mut stream).unwrap().steps {
            let kind = step.mistake.map(|(kind, _)| kind);
            let difficulty = step.difficulty as usize;
            match kind {
                Some(Mistake::FollowedClaim) => followed += 1,
                _ => steps[difficulty] += 1,
            }
            match kind {
                Some(Mistake::ForgottenCarry) => forgotten[difficulty] += 1,
                Some(Mistake::UnitsSlip | Mistake::TensSlip) => {
                    (slips, could_slip) = (slips + 1, could_slip + 1)
                }
                None => could_slip += 1,
                Some(Mistake::FollowedClaim) => {}
            }
            if let Some((_, Reach::Local)) = step.mistake {
                assert!(matches!(kind, Some(Mistake::UnitsSlip | Mistake::TensSlip)));
                local += 1;
            }
        }
    }
    let near = |count: u32, of: u32, permille: u32| {
        let (rate, expected) = (
            f64::from(count) / f64::from(of),
            f64::from(permille) / 1000.0,
        );
        // Five standard deviations of a binomial.
        let tolerance = 5.0 * (expected * (1.0 - expected) / f64::from(of)).sqrt();
        assert!(
            (rate - expected).abs() < tolerance,
            "{rate} of {of}, expected {expected} ± {tolerance}"
        );
    };
    assert_eq!(forgotten[Difficulty::Easy as usize], 0);
    near(
        forgotten[Difficulty::Hard as usize],
        steps[Difficulty::Hard as usize],
        rates.hard_permille,
    );
    near(
        forgotten[Difficulty::Severe as usize],
        steps[Difficulty::Severe as usize],
        rates.severe_permille,
    );
    near(slips, could_slip, rates.slip_permille);
    near(followed, PROBLEMS / 2, rates.follow_permille);
    near(local, slips, rates.local_permille);
    assert!(steps[Difficulty::Severe as usize] > 2000, "{steps:?}");
}

#[test]
fn pairs_prefer_fewer_mistakes_unless_flipped() {
    let settings = PairSettings::CONFLICT;
    let pairs = preference_pairs(&settings, 5, 2000).unwrap();
    let mut wrong_steps = [0; 2];
    for pair in &pairs {
        let (chosen, rejected) = (pair.chosen.mistakes(), pair.rejected.mistakes());
        assert!(chosen >= 1 && rejected >= 1);
        assert_eq!(chosen > rejected, pair.flipped);
        assert_ne!(chosen, rejected);
        wrong_steps[0] += chosen;
        wrong_steps[1] += rejected;
        for side in [Side::Chosen, Side::Rejected] {
            let keep = pair.truth_keep(side);
            let labels = pair.labels(side);
            for (&keep, truth) in keep.as_slice().iter().zip(labels) {
                assert_eq!(keep, truth.right == (side == Side::Chosen));
                assert!(truth.right || matches!(truth.slot, Slot::ResultUnits | Slot::ResultTens));
            }
        }
        assert_eq!(pair.tokenized(9).prompt, pair.problem.prompt());
    }
    let flipped = pairs.iter().filter(|pair| pair.flipped).count();
    // Five standard deviations of 2000 draws at 0.25.
    assert!(flipped.abs_diff(500) < 97, "{flipped}");
    // The two sides are close, which is what makes this world hard for an unmasked loss.
    let [chosen, rejected] = wrong_steps.map(|steps| steps as f64 / (4.0 * 2000.0));
    assert!(
        (0.3..0.45).contains(&chosen) && (0.42..0.6).contains(&rejected),
        "{chosen} {rejected}"
    );
    assert!(
        preference_pairs(&PairSettings::CLEAN, 5, 200)
            .unwrap()
            .iter()
            .all(|pair| !pair.flipped)
    );
}

#[test]
fn impossible_settings_are_refused() {
    let never = PairSettings {
        rates: MistakeRates::NONE,
        ..PairSettings::CONFLICT
    };
    assert!(matches!(
        preference_pairs(&never, 1, 1),
        Err(WorldError::NoPair { .. })
    ));
    let flip = PairSettings {
        flip_permille: 1001,
        ..PairSettings::CONFLICT
    };
    assert!(
        preference_pairs(&flip, 1, 1)
            .unwrap_err()
            .to_string()
            .contains("`flip_permille` is 1001")
    );
    let shape = ProblemShape {
        steps: 9,
        ..ProblemShape::USUAL
    };
    assert!(matches!(
        shape.check(),
        Err(WorldError::Range { name: "steps", .. })
    ));
    let minus = Operation::new(Operator::Minus, 6).unwrap();
    assert_eq!(
        Problem::new(5, vec![minus], None),
        Err(WorldError::Overflow { step: 0, found: -1 })
    );
    assert_eq!(
        Problem::new(9, vec![minus], Some(3)),
        Err(WorldError::RightClaim { found: 3 })
    );
    assert!(Problem::new(9, vec![], None).is_err() && Operation::new(Operator::Plus, 100).is_err());
    let parts = CorpusSettings {
        short_permille: 900,
        ..CorpusSettings::EMBEDDED
    };
    assert!(training_batch(&parts, 1, 0).is_err());
}

#[test]
fn nothing_evaluated_was_trained_on() {
    let without_claim = |problem: &Problem| {
        Problem::new(problem.start(), problem.operations().to_vec(), None)
            .unwrap()
            .prompt()
    };
    let mut evaluated = HashSet::new();
    let mut sizes = 0;
    for split in Split::ALL {
        let samples = evaluation_samples(split, 1, 512).unwrap();
        assert_eq!(
            samples[..100],
            evaluation_samples(split, 1, 100).unwrap()[..]
        );
        let prompts: HashSet<Vec<u32>> = samples
            .iter()
            .map(|sample| {
                sample
                    .problem
                    .as_ref()
                    .map_or(sample.sample.prompt.clone(), without_claim)
            })
            .collect();
        sizes += prompts.len();
        evaluated.extend(prompts);
        for sample in &samples {
            assert_eq!(
                sample.problem.as_ref().and_then(Problem::claim).is_some(),
                split == Split::Adversarial
            );
            if let Some(problem) = &sample.problem {
                assert_eq!(problem.partition(), split.partition());
                assert!(judge(problem, &sample.sample.response).exact);
            }
        }
    }
    assert_eq!(evaluated.len(), sizes, "two splits share a problem");
    for pair in preference_pairs(&PairSettings::CONFLICT, 1, 1024).unwrap() {
        assert!(!evaluated.contains(&pair.problem.prompt()));
    }
    for index in 290..330 {
        for sample in training_batch(&CorpusSettings::EMBEDDED, 1, index).unwrap() {
            // A claim is `?` and two digits behind the first operation; the partition does not look at it.
            let text = decode(&sample.prompt).unwrap();
            let bare = match text.find('?') {
                Some(at) => format!("{}{}", &text[..at], &text[at + 3..]),
                None => text,
            };
            assert!(!evaluated.contains(&encode(&bare).unwrap()), "{bare}");
        }
    }
}

#[test]
fn the_corpus_has_its_parts_and_begins_with_short_chains() {
    let settings = CorpusSettings::EMBEDDED;
    let text = |index| -> Vec<String> {
        let batch = training_batch(&settings, 4, index).unwrap();
        batch
            .iter()
            .map(|sample| decode(&sample.prompt).unwrap())
            .collect()
    };
    let letters = |prompt: &str| prompt.chars().filter(char::is_ascii_uppercase).count();
    assert!((0..5).flat_map(text).all(|prompt| letters(&prompt) <= 2));
    let later: Vec<String> = (300..400).flat_map(text).collect();
    let part = |is: &dyn Fn(&str) -> bool| later.iter().filter(|prompt| is(prompt)).count();
    // 3200 samples: five standard deviations of the widest part are 141.
    assert!(part(&|prompt| prompt.starts_with("^#")).abs_diff(384) < 92);
    assert!(part(&|prompt| letters(prompt) == 6).abs_diff(576) < 109);
    assert!(part(&|prompt| (1..=3).contains(&letters(prompt))).abs_diff(480) < 101);
    assert!(part(&|prompt| prompt.contains('?')).abs_diff(563) < 108);
}

/// The bytes are fixed: the embedded policy is a function of them.
#[test]
fn draws_are_the_same_everywhere() {
    let mut bytes = Vec::new();
    for index in [0, 1000] {
        for sample in training_batch(&CorpusSettings::EMBEDDED, 1, index).unwrap() {
            bytes.extend(
                decode(&sample.prompt)
                    .unwrap()
                    .bytes()
                    .chain(decode(&sample.response).unwrap().bytes()),
            );
        }
    }
    for pair in preference_pairs(&PairSettings::CONFLICT, 1, 16).unwrap() {
        let pair = pair.tokenized(0);
        bytes.extend(
            [pair.prompt, pair.chosen, pair.rejected]
                .concat()
                .iter()
                .map(|&token| token as u8),
        );
    }
    let first = &preference_pairs(&PairSettings::CONFLICT, 1, 1).unwrap()[0].tokenized(0);
    let texts =
        [&first.prompt, &first.chosen, &first.rejected].map(|tokens| decode(tokens).unwrap());
    let expected = [
        "^D+31C-91B+80A+40=82;",
        "82D+31=14;14C-91=23;23B+80=03;03A+40=43;$",
        "82D+31=13;13C-91=22;22B+80=13;13A+40=53;$",
    ];
    assert_eq!(texts, expected);
    assert_eq!(
        pivotal_core::content_hash(&bytes),
        "368b3d91c9093214158cf766a2a5f2640b79ba69c4e85da8aecdfe563a0960ab"
    );
}
