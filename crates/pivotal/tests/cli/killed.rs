//! Runs that are killed (SIGKILL) at many moments: resumed, every byte is that of the run that was not.
//!
//! The moments come from a seeded list: a share of the whole run's time, or some microseconds after the n-th checkpoint
//! began to be written. `PIVOTAL_KILLS=300` asks for more of them a recipe than the few that fit in every test run, and
//! `PIVOTAL_KILL_SEED` for another list; `PIVOTAL_KILL_RECIPE` names one recipe.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Scratch;

/// A recipe's name and its flags. Its input files are those of [`inputs`]; one line makes another recipe part of the test.
const RECIPES: [(&str, &str); 6] = [
    (
        "dpo",
        "--data signals.jsonl --batch 1 --epochs 2 --loss tdpo2",
    ),
    (
        "sft",
        "--data signals.jsonl --batch 1 --epochs 2 --credit-selection agree",
    ),
    ("reward", "--data signals.jsonl --batch 1 --epochs 2"),
    (
        "grpo",
        "--data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 --steps 6 --minibatches 2 \
         --eval-data prompts.jsonl --eval-every 3 --credit-signal advantage \
         --credit-baseline running_mean --credit-cut fixed --credit-cut-tokens 2",
    ),
    (
        "ppo",
        "--data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 --steps 6 --value-lr 0.01 \
         --eval-data prompts.jsonl --kl-target 0.5 --kl-horizon 100 --score-scaling normal \
         --credit-signal critic --credit-baseline running_mean",
    ),
    (
        "reject",
        "--data prompts.jsonl --prompts 2 --samples 4 --best 2 --max-new-tokens 6 --rounds 3 --batch 1 \
         --eval-data prompts.jsonl --credit-selection random --credit-random-fraction 0.5 \
         --credit-cut fixed --credit-cut-tokens 2",
    ),
];

/// What every one of them gets: small checkpoints, often, and events.
const COMMON: &str =
    "--model MODEL --lora-rank 4 --lr 0.01 --checkpoint-every 2 --tensorboard true";

const PROMPTS: &str = r#"{"prompt": "say a", "checks": [{"kind": "lower_case"}, {"kind": "regex", "pattern": "[aeiou]"}]}
{"prompt": "no z", "checks": [{"kind": "regex", "pattern": "^[^z]+$"}, {"kind": "max_words", "count": 2}]}
{"prompt": "2+2=", "answer": 4, "checks": [{"kind": "regex", "pattern": "[0-4]"}]}
"#;

/// Kills a recipe where the environment does not say.
const KILLS: usize = 24;

/// Pairs with a signal that changes its sign within each response: one token a character, and EOS.
fn inputs(scratch: &Scratch) {
    let lines = super::PAIRS.lines().map(|line| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        for side in ["chosen", "rejected"] {
            let tokens = row[side].as_str().unwrap().len() + 1;
            let signal = (0..tokens).map(|token| match token % 3 {
                0 => -0.5,
                rest => rest as f64,
            });
            row[format!("{side}_signal")] = signal.collect();
        }
        format!("{row}\n")
    });
    scratch.write("signals.jsonl", lines.collect::<String>());
    scratch.write("prompts.jsonl", PROMPTS);
}

/// When a process is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After this share of the time that the whole run takes.
    Share(f64),
    /// So long after the n-th checkpoint from here began to be written.
    Checkpoint { nth: u32, micros: u64 },
}

/// SplitMix64 (Steele, Lea and Flood 2014): the list of moments is the same everywhere.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, count: u64) -> u64 {
        self.next() % count
    }

    fn moment(&mut self) -> Moment {
        match self.below(5) {
            0 | 1 => Moment::Checkpoint {
                nth: self.below(4) as u32,
                micros: self.below(4000),
            },
            _ => Moment::Share(self.below(10_000) as f64 / 10_000.0),
        }
    }
}

fn spawn(scratch: &Scratch, command: &str) -> Child {
    let model = super::golden("llama").display().to_string();
    Command::new(assert_cmd::cargo::cargo_bin("pivotal"))
        .current_dir(scratch.0.path())
        .args(command.replace("MODEL", &model).split_whitespace())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Kills `child` at `moment`, and says whether it was still running.
fn kill(mut child: Child, run: &Path, moment: Moment, whole: Duration) -> bool {
    let begin = Instant::now();
    match moment {
        Moment::Share(share) => std::thread::sleep(whole.mul_f64(share)),
        Moment::Checkpoint { nth, micros } => {
            let unfinished = run.join("checkpoints/.unfinished");
            let (mut seen, mut there) = (0, false);
            // It appears and is renamed away again: each time it is there anew is a checkpoint.
            while seen <= nth && begin.elapsed() < 4 * whole && child.try_wait().unwrap().is_none()
            {
                let now = unfinished.is_dir();
                seen += u32::from(now && !there);
                there = now;
            }
            std::thread::sleep(Duration::from_micros(micros));
        }
    }
    let running = child.try_wait().unwrap().is_none();
    let _ = child.kill();
    child.wait().unwrap();
    running
}

/// Every file of a run by its path, without what only clocks know.
fn files(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut directories = vec![run.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            let name = path.strip_prefix(run).unwrap().to_path_buf();
            let bytes = match name.to_str().unwrap() {
                "timings.jsonl" => continue,
                "summary.json" => {
                    let mut summary: Value = serde_json::from_slice(&bytes).unwrap();
                    summary.as_object_mut().unwrap().remove("timings");
                    summary.to_string().into_bytes()
                }
                text if text.starts_with("tensorboard") => without_times(&bytes),
                _ => bytes,
            };
            found.insert(name, bytes);
        }
    }
    found
}

/// The events of a file without their wall times: eight bytes behind a key, first in each event; their checksum goes too.
fn without_times(bytes: &[u8]) -> Vec<u8> {
    let (mut rest, mut events) = (bytes, Vec::new());
    while let Some((len, _)) = rest.split_first_chunk::<8>() {
        let len = u64::from_le_bytes(*len) as usize;
        events.extend_from_slice(&rest[12 + 9..12 + len]);
        rest = &rest[12 + len + 4..];
    }
    events
}

fn assert_same(what: &str, whole: &BTreeMap<PathBuf, Vec<u8>>, found: &BTreeMap<PathBuf, Vec<u8>>) {
    let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(whole), "{what}");
    for (name, bytes) in found {
        assert!(
            bytes == &whole[name],
            "{what}: `{}` differs",
            name.display()
        );
    }
}

/// What a seed decides: all but the number of threads, which configuration and manifest tell.
fn decided_by_seed(mut files: BTreeMap<PathBuf, Vec<u8>>) -> BTreeMap<PathBuf, Vec<u8>> {
    files.retain(|name, _| {
        !["config.toml", "manifest.json"]
            .iter()
            .any(|told| name.ends_with(told))
    });
    files
}

/// Counts for whoever runs the long version.
#[derive(Debug, Default)]
struct Counts {
    kills: usize,
    before_the_run_was_there: usize,
    in_a_resumed_run: usize,
    too_late: usize,
}

fn killed_and_resumed(recipe: &str, flags: &str, kills: usize, seed: u64) -> Counts {
    let start = format!("{recipe} {COMMON} {flags} --threads 1 --out run");
    let whole = Scratch::new();
    inputs(&whole);
    let begin = Instant::now();
    whole.good(&start);
    let took = begin.elapsed();
    let expected = files(&whole.path("run"));
    let two = start.replace("--threads 1", "--threads 2");
    whole.good(&format!("{two} --overwrite"));
    let at_two = decided_by_seed(files(&whole.path("run")));
    assert_same(
        &format!("{recipe}, 2 threads"),
        &decided_by_seed(expected.clone()),
        &at_two,
    );

    let mut draws = Draws(seed);
    let mut counts = Counts::default();
    let scratch = Scratch::new();
    inputs(&scratch);
    let run = scratch.path("run");
    for attempt in 0..kills {
        // An attempt makes its run, or replaces that of the attempt before: that may be cut short too.
        if run.exists() && draws.below(2) == 0 {
            std::fs::remove_dir_all(&run).unwrap();
        }
        let mut command = format!("{start} --overwrite");
        let mut moments = Vec::new();
        loop {
            let moment = draws.moment();
            moments.push(moment);
            match kill(spawn(&scratch, &command), &run, moment, took) {
                true => counts.kills += 1,
                false => counts.too_late += 1,
            }
            counts.in_a_resumed_run += usize::from(command.contains("--resume"));
            command = match run.exists() {
                true => format!("{recipe} --resume run --threads 1"),
                false => {
                    counts.before_the_run_was_there += 1;
                    format!("{start} --overwrite")
                }
            };
            // One in three is killed again.
            if draws.below(3) > 0 {
                break;
            }
        }
        scratch.good(&command);
        let what = format!("{recipe}, attempt {attempt} of seed {seed}, killed at {moments:?}");
        assert_same(&what, &expected, &files(&run));
    }
    counts
}

/// An evaluation is written in two files: cut short between the two, or within the first, it is made again, once.
#[test]
fn an_evaluation_that_was_cut_short_is_made_again_once() {
    let scratch = Scratch::new();
    inputs(&scratch);
    let (recipe, flags) = RECIPES[3];
    scratch.good(&format!("{recipe} {COMMON} {flags} --threads 1 --out run"));
    let run = scratch.path("run");
    let whole = files(&run);
    for cut in [0, 50] {
        for gone in ["checkpoints", "adapter"] {
            std::fs::remove_dir_all(run.join(gone)).unwrap();
        }
        std::fs::remove_file(run.join("summary.json")).unwrap();
        scratch.write("run/evaluations.jsonl", "");
        let responses = scratch.read("run/evaluation_rollouts.jsonl");
        let first = responses.lines().take(3).map(|line| format!("{line}\n"));
        let first: String = first.collect();
        scratch.write("run/evaluation_rollouts.jsonl", &first[..first.len() - cut]);
        scratch.good("grpo --resume run --threads 1");
        assert_same("an evaluation cut short", &whole, &files(&run));
    }
}

/// What a kill after the last checkpoint's rename leaves: older ones than are kept, one of them half-removed.
#[test]
fn a_finished_run_has_nothing_left_of_a_killed_writer() {
    let scratch = Scratch::new();
    inputs(&scratch);
    let (recipe, flags) = RECIPES[0];
    scratch.good(&format!("{recipe} {COMMON} {flags} --threads 1 --out run"));
    let run = scratch.path("run");
    let whole = files(&run);
    for directory in ["step-00000001", ".unfinished"] {
        let path = run.join("checkpoints").join(directory);
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("state.json"), "{").unwrap();
    }
    scratch.write("run/metrics.jsonl.77.tmp", "{");
    scratch.write("run/adapter/adapter_config.json.77.tmp", "{");
    scratch.good("dpo --resume run --threads 1");
    assert_same("a finished run", &whole, &files(&run));
}

#[test]
#[expect(
    clippy::print_stdout,
    reason = "the counts are what the long version is run for"
)]
fn detail_31_a_killed_run_of_any_recipe_resumes_to_the_same_bytes() {
    let number = |name: &str| {
        let value = std::env::var(name).ok()?;
        Some(
            value
                .parse()
                .unwrap_or_else(|_| panic!("`{name}` is `{value}`, expected a number")),
        )
    };
    let kills = number("PIVOTAL_KILLS").unwrap_or(KILLS as u64) as usize;
    let seed = number("PIVOTAL_KILL_SEED").unwrap_or(0x5eed);
    let only = std::env::var("PIVOTAL_KILL_RECIPE").ok();
    for (place, (recipe, flags)) in RECIPES.into_iter().enumerate() {
        if only.as_ref().is_some_and(|only| only != recipe) {
            continue;
        }
        let begin = Instant::now();
        let counts = killed_and_resumed(recipe, flags, kills, seed + place as u64);
        println!("{recipe}: {counts:?}, {:.1?}", begin.elapsed());
        assert!(counts.kills > 0, "{recipe}: nothing was killed: {counts:?}");
    }
}
