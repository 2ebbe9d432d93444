//! The suite `scaling`: training and scoring at response lengths from 64 to 4,096, with attention's quadratic part and the
//! memory of one pair.
//!
//! Memory is measured first, one pair at a time and the shortest first: what an allocator keeps of a shorter pair can then
//! not be mistaken for what a longer one needs. Time is measured on as many pairs as make a step of about the same tokens.

use pivotal_core::{TokenMask, TokenizedPair};
use pivotal_kernels::account::Part;
use pivotal_loss::Normalisation;
use pivotal_model::{Decoder, Parameters};
use pivotal_train::dpo::{DpoItem, DpoObjective, PreferenceLoss, optimize};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::score::{Group, token_logps};
use pivotal_train::settings::OptimizerSettings;
use serde_json::json;

use crate::bench::Bench;
use crate::bench::flops::{Head, Pass, Work, flops};
use crate::bench::outcome::Outcome;
use crate::bench::subject::{mask, random_pairs};
use crate::bench::training::{Steps, optimizer_settings, timed_warm};
use crate::failure::Failure;
use crate::machine;
use crate::output::{print_line, tell};

const PROMPT: usize = 128;
const RESPONSES: [usize; 7] = [64, 128, 256, 512, 1024, 2048, 4096];
/// Tokens that a timed step has at least, where a pair has fewer.
const STEP_TOKENS: usize = 2304;

pub(crate) fn run(bench: &Bench) -> Result<Vec<Outcome>, Failure> {
    let mut outcomes = suite(bench, &mut Scoring(bench.subject.base.detached()))?;
    outcomes.extend(suite(bench, &mut Training::new(bench)?)?);
    Ok(outcomes)
}

/// What is done to pairs of one length.
trait Task {
    const NAME: &'static str;
    const PASS: Pass;

    fn run(&mut self, items: &[DpoItem], step: u64) -> Result<(), Failure>;

    /// Rank of the adapters that the work goes through.
    fn rank(&self) -> usize;
}

struct Scoring(Decoder);

struct Training {
    policy: Decoder,
    optimizer: NamedAdamW,
    settings: OptimizerSettings,
    rank: usize,
}

/// What one pair held.
#[derive(Clone, Copy)]
struct Probe {
    response: usize,
    tokens: usize,
    peak_bytes: Option<u64>,
}

fn suite<T: Task>(bench: &Bench, task: &mut T) -> Result<Vec<Outcome>, Failure> {
    let longest = bench.subject.base.config().max_positions;
    let fitting = RESPONSES
        .iter()
        .filter(|&&tokens| PROMPT + tokens <= longest);
    let mut probes: Vec<Probe> = Vec::new();
    for &response in fitting {
        if let Some(shortage) = probes.last().and_then(|last| shortage(bench, *last)) {
            print_line(&format!(
                "{} stops before responses of {response}: {shortage}",
                T::NAME
            ))?;
            break;
        }
        let counted = machine::reset_peak();
        task.run(&items(bench, 1, response), 0)?;
        probes.push(Probe {
            response,
            tokens: PROMPT + 2 * response,
            peak_bytes: machine::peak_bytes().filter(|_| counted),
        });
    }
    if probes.is_empty() {
        return Err(Failure::input(format!(
            "the model has {longest} positions, expected at least {}",
            PROMPT + RESPONSES[0]
        )));
    }
    let mut before = None;
    probes
        .iter()
        .map(|&probe| point(bench, task, probe, before.replace(probe)))
        .collect()
}

/// Twice the tokens take at most twice the activations again; what that lacks, if anything.
fn shortage(bench: &Bench, last: Probe) -> Option<String> {
    let mut weights = 0;
    bench
        .subject
        .base
        .clone()
        .visit_parameters(&mut |_, parameter| {
            weights += 4 * parameter.shape().iter().product::<usize>() as u64;
        });
    let (peak, available) = (last.peak_bytes?, machine::available_bytes()?);
    let more = peak.saturating_sub(weights);
    (more as f64 > 0.9 * available as f64).then(|| {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        format!(
            "it may take {:.1} GB more, and {:.1} are available",
            gigabytes(more),
            gigabytes(available)
        )
    })
}

fn point<T: Task>(
    bench: &Bench,
    task: &mut T,
    probe: Probe,
    before: Option<Probe>,
) -> Result<Outcome, Failure> {
    let pairs = (STEP_TOKENS / probe.tokens).max(1);
    let items = items(bench, pairs, probe.response);
    let step = Steps {
        batches: vec![(0..pairs).collect()],
    };
    // A pair alone was a step already, when its memory was measured.
    if pairs > 1 {
        task.run(&items, 0)?;
    }
    tell(&format!("{}: responses of {}", T::NAME, probe.response));
    let repetitions = timed_warm(&step, bench.settings.repeat, |_, number| {
        task.run(&items, number).map(|()| None)
    })?;
    let mut work = Work::default();
    for item in &items {
        let [chosen, rejected] = &item.keep;
        let sides = [chosen, rejected].map(TokenMask::as_slice);
        work.add_kept(item.pair.prompt.len(), &sides);
    }
    let config = bench.subject.base.config();
    let needed = flops(config, task.rank(), work, Head::Vocabulary, T::PASS);
    let outcome = Outcome {
        pairs: Some(pairs),
        tokens: pairs * probe.tokens,
        data: format!(
            "random token ids: prompts of {PROMPT}, responses of {}",
            probe.response
        ),
        settings: [
            ("response_tokens", json!(probe.response)),
            ("lora_rank", json!(task.rank())),
            ("keep", json!(bench.settings.keep.to_string())),
            ("activations", json!(bench.settings.activations.to_string())),
        ]
        .into(),
        ..bench.outcome("scaling", format!("{}, {}", T::NAME, probe.response))
    };
    let mut outcome = outcome.counted(needed).timed(&repetitions);
    outcome.peak_bytes = probe.peak_bytes;
    let share = needed.attention as f64 / needed.total() as f64;
    let figures = [
        ("attention_flop_percent", Some(100.0 * share)),
        (
            "attention_time_percent",
            outcome.share(Part::Attention).map(|share| 100.0 * share),
        ),
        ("pair_tokens", Some(probe.tokens as f64)),
        (
            "peak_bytes_an_added_token",
            before.and_then(|before| slope(before, probe)),
        ),
    ];
    let known = figures
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    outcome.figures.extend(known);
    Ok(outcome)
}

fn slope(before: Probe, probe: Probe) -> Option<f64> {
    let bytes = probe.peak_bytes? as f64 - before.peak_bytes? as f64;
    Some(bytes / (probe.tokens - before.tokens) as f64)
}

fn items(bench: &Bench, count: usize, response: usize) -> Vec<DpoItem> {
    let vocab = bench.subject.base.config().vocab_size;
    let item = |(index, pair): (usize, TokenizedPair)| DpoItem {
        mismatched: None,
        pair,
        keep: [0, 1].map(|side| TokenMask::from(mask(bench.settings.keep, response, index, side))),
        // As good as any: the reference's pass is what `scoring` measures.
        reference_logps: [vec![-10.0; response], vec![-10.0; response]],
    };
    let pairs = random_pairs(count, PROMPT, response, vocab).into_iter();
    pairs.enumerate().map(item).collect()
}

impl Task for Scoring {
    const NAME: &'static str = "score";
    const PASS: Pass = Pass::Forward;

    fn run(&mut self, items: &[DpoItem], _step: u64) -> Result<(), Failure> {
        let groups: Vec<_> = items
            .iter()
            .map(|item| Group::of_pair(&item.pair))
            .collect();
        let budget = OptimizerSettings::default().micro_batch_tokens;
        token_logps(&self.0, &groups, budget)?;
        Ok(())
    }

    fn rank(&self) -> usize {
        0
    }
}

impl Training {
    fn new(bench: &Bench) -> Result<Self, Failure> {
        let settings = optimizer_settings(&bench.settings);
        Ok(Self {
            policy: bench.subject.policy(bench.settings.lora_rank)?,
            optimizer: NamedAdamW::new(&settings),
            settings,
            rank: bench.settings.lora_rank,
        })
    }
}

impl Task for Training {
    const NAME: &'static str = "train";
    const PASS: Pass = Pass::Training;

    fn run(&mut self, items: &[DpoItem], step: u64) -> Result<(), Failure> {
        let objective = DpoObjective {
            loss: PreferenceLoss::Dpo,
            beta: 0.1,
            normalisation: Normalisation::Sum,
            dropped_every: 0,
            reference: None,
        };
        let batch: Vec<usize> = (0..items.len()).collect();
        optimize(
            &mut self.policy,
            items,
            objective,
            &self.settings,
            &mut self.optimizer,
            std::iter::once(batch),
            step..step + 1,
            &mut |_, _, _, _| Ok(()),
        )?;
        Ok(())
    }

    fn rank(&self) -> usize {
        self.rank
    }
}
