use super::*;
use crate::onpolicy::Timings;

/// The text of a frame, without its styles.
fn text(course: &Course, seconds: u64, columns: u16, rows: u16) -> String {
    let frame = panel::render(course, Duration::from_secs(seconds), columns, rows);
    let rows = screen::rows(&frame).map(|row| {
        assert!(row.len() <= usize::from(columns));
        row.iter().map(|cell| cell.symbol()).collect::<String>()
    });
    let rows: Vec<String> = rows.collect();
    assert!(frame.area.height <= rows.len() as u16);
    rows.join("\n")
}

/// A step of dpo: the loss falls, the accuracy rises.
fn pairs(step: u64) -> StepNumbers {
    let far = step as f64;
    StepNumbers {
        loss: std::f64::consts::LN_2 * (-far / 60.0).exp(),
        accuracy: Some(1.0 - 0.5 * (-far / 40.0).exp()),
        kl: Some(0.002 * far),
        kept_fraction: Some(0.48),
        segments_per_100_tokens: Some(12.4),
        grad_norm: 0.83,
        lr: 1e-4,
        tokens: 620,
        ..StepNumbers::default()
    }
}

/// A step of grpo: the score rises with a swing, most of the time goes to generation.
fn rollouts(step: u64) -> StepNumbers {
    let far = step as f64;
    StepNumbers {
        loss: 0.02 * (far / 9.0).cos(),
        score: Some(0.3 + 0.004 * far + 0.05 * (far / 7.0).sin()),
        accuracy: None,
        tokens: 2048,
        timings: Some(Timings {
            generation_seconds: 3.1,
            scoring_seconds: 0.5,
            update_seconds: 1.4,
            ..Timings::default()
        }),
        ..pairs(step)
    }
}

const SHORT: &str =
    "over-segmentation: the median segment has 1 tokens; raise the offset or `min_len`";
const EMPTY: &str = "empty-masks: 62 % of responses have an empty mask";

fn course(recipe: &'static str, steps: u64, numbers: fn(u64) -> StepNumbers) -> Course {
    let mut course = Course::new(recipe, 0..400);
    for step in 1..=steps {
        course.step(step, Duration::from_secs(2 * step), numbers(step));
    }
    course
}

#[test]
fn before_the_first_step_the_panel_says_that_it_waits() {
    let mut course = Course::new("sft", 0..400);
    insta::assert_snapshot!("no_data", text(&course, 3, 79, 23));
    course.phase = Some("evaluation");
    insta::assert_snapshot!("no_data_narrow", text(&course, 3, 39, 9));
}

#[test]
fn a_run_on_its_way() {
    insta::assert_snapshot!("dpo_79x23", text(&course("dpo", 120, pairs), 241, 79, 23));
    let mut grpo = course("grpo", 90, rollouts);
    grpo.phase = Some("generation");
    insta::assert_snapshot!("grpo_79x23", text(&grpo, 183, 79, 23));
    insta::assert_snapshot!("grpo_199x49", text(&grpo, 183, 199, 49));
}

#[test]
fn a_narrow_terminal_gets_a_list() {
    let grpo = course("grpo", 90, rollouts);
    insta::assert_snapshot!("grpo_39x9", text(&grpo, 183, 39, 9));
    insta::assert_snapshot!("grpo_12x3", text(&grpo, 183, 12, 3));
}

#[test]
fn warnings_stand_in_the_panel() {
    let mut dpo = course("dpo", 119, pairs);
    dpo.warn(SHORT, Duration::from_secs(238));
    dpo.step(120, Duration::from_secs(240), pairs(120));
    dpo.warn(EMPTY, Duration::from_secs(240));
    dpo.warn(EMPTY, Duration::from_secs(240));
    insta::assert_snapshot!("warnings_79x23", text(&dpo, 241, 79, 23));
    insta::assert_snapshot!("warnings_39x9", text(&dpo, 241, 39, 9));
}

#[test]
fn no_size_is_too_small_and_no_number_too_odd() {
    for recipe in ["dpo", "grpo"] {
        let mut course = course(recipe, 3, if recipe == "dpo" { pairs } else { rollouts });
        course.warn(SHORT, Duration::ZERO);
        let numbers = StepNumbers {
            loss: f64::NAN,
            score: Some(f64::INFINITY),
            kl: Some(1e30),
            lr: 0.0,
            ..rollouts(4)
        };
        course.step(4, Duration::from_secs(8), numbers);
        for (columns, rows) in
            (0..90).flat_map(|columns| [0, 1, 5, 14, 15, 34, 60].map(|rows| (columns, rows)))
        {
            let frame = panel::render(&course, Duration::from_secs(9), columns, rows);
            assert!(
                frame.area.width <= columns && frame.area.height <= rows.max(1),
                "{columns} {rows}"
            );
        }
    }
}

#[test]
fn a_line_says_it_all() {
    let grpo = course("grpo", 90, rollouts);
    let line = words::line(&grpo, Duration::from_secs(183));
    insta::assert_snapshot!(line, @"grpo 90/400: loss -0.0168, score 0.674, kl 0.1800, kept 48 %, segments/100 12.4, grad 0.830, lr 1.0e-4, 1,024 tokens/s, time generation 62 % scoring 10 % update 28 %, elapsed 3m 03s, eta 10m 20s");
}

#[test]
fn a_warning_is_said_once_and_again_after_a_while() {
    let mut course = course("dpo", 1, pairs);
    let minute = Duration::from_secs(60);
    let said: Vec<bool> = (0..12)
        .map(|minutes| course.warn(SHORT, minutes * minute).is_some())
        .collect();
    let times: Vec<usize> = (0..12).filter(|&minutes| said[minutes]).collect();
    assert_eq!(times, [0, 5, 10]);
    assert!(course.warn(EMPTY, minute).is_some());
    let other = SHORT.replace("has 1", "has 2");
    assert!(course.warn(&other, 11 * minute).is_none());
    assert_eq!(course.notices.len(), 2);
    assert_eq!(
        (course.notices[0].count, &course.notices[0].text),
        (13, &other)
    );
}

#[test]
fn a_long_run_keeps_a_short_trace_of_all_of_it() {
    let mut course = Course::new("sft", 0..5000);
    for step in 1..=5000u64 {
        let loss = step as f64;
        course.step(
            step,
            Duration::ZERO,
            StepNumbers {
                loss,
                ..StepNumbers::default()
            },
        );
    }
    let columns = course.loss.columns(50);
    assert_eq!(columns.len(), 50);
    assert!(
        columns.windows(2).all(|pair| pair[0] < pair[1]),
        "{columns:?}"
    );
    // Means of the first and the last fiftieth.
    assert!(
        (columns[0] - 50.0).abs() < 20.0 && (columns[49] - 4950.0).abs() < 50.0,
        "{columns:?}"
    );
}

#[test]
fn speed_and_eta_are_those_of_the_last_steps() {
    let mut course = Course::new("dpo", 0..100);
    // A slow start, then a step a second.
    for step in 1..=50u64 {
        course.step(step, Duration::from_secs(100 + step), pairs(step));
    }
    assert_eq!(course.tokens_per_second(), Some(620.0));
    assert_eq!(course.eta(), Some(Duration::from_secs(50)));
    assert_eq!(words::span(Duration::from_secs(3 * 3600 + 61)), "3h 01m");
}

#[test]
fn no_zero_is_below_zero() {
    let numbers = [-0.0, -0.00004, -0.00006, 0.5].map(words::number);
    assert_eq!(numbers, ["0.0000", "0.0000", "-0.0001", "0.5000"]);
}

#[test]
fn a_panic_is_said_after_the_last_drawing() {
    let shared = Shared {
        course: course("dpo", 1, pairs),
        begin: Instant::now(),
        view: View::Lines { last: None },
    };
    let shared = Arc::new(Mutex::new(shared));
    stop_before_a_panic_is_said(Arc::downgrade(&shared));
    let panicked = std::thread::spawn(|| panic!("on purpose")).join();
    assert!(panicked.is_err());
    assert!(matches!(lock(&shared).view, View::Off));
}
