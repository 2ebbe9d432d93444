//! The commands that run a study and write its report.

use super::{Scratch, says};

#[test]
fn trainers_write_a_report_and_replace_none_unasked() {
    let scratch = Scratch::new();
    let shown = scratch.good("lab trainers --smoke --out study");
    for label in [
        "DPO: segment credit, log_ratio",
        "Reject: truth mask",
        "GRPO: random, equal fraction",
        "PPO: segment credit, critic",
    ] {
        says(&shown, &[label]);
        says(&scratch.read("study/report.html"), &[label]);
    }
    says(
        &scratch.read("study/report.md"),
        &["## Comparisons", "pivotal lab trainers --smoke"],
    );
    says(&scratch.read("study/study.json"), &["\"grpo_log_ratio\""]);
    let error = scratch.bad("lab trainers --smoke --out study", "");
    says(&error, &["`study` exists", "--overwrite"]);
}

#[test]
fn a_grid_of_trainers_refuses_what_it_does_not_tune() {
    let error = Scratch::new().bad("lab trainers-grid --trainers dpo", "");
    says(&error, &["dpo", "reject", "grpo", "ppo"]);
}
