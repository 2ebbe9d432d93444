//! How a run goes, while it goes: a dashboard where standard error is a terminal, plain lines where it is not.
//!
//! Nothing here has a part in the run: no number comes from here, and a run under any [`ProgressMode`] writes the same
//! bytes. Standard output is left to the summary.

use std::io::Write;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

mod course;
mod panel;
mod screen;
#[cfg(test)]
mod tests;
mod words;

use course::Course;
pub(crate) use course::StepNumbers;
use screen::Screen;

/// How a run shows its progress, on standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ProgressMode {
    /// A dashboard on a terminal, lines elsewhere.
    #[default]
    Auto,
    /// The same: a dashboard cannot be drawn elsewhere.
    Dashboard,
    /// A line now and then.
    Lines,
    /// Nothing.
    Off,
}

/// The shortest time between two drawings.
const REDRAW: Duration = Duration::from_millis(100);
/// How often a dashboard is drawn again between steps, so that its clock goes.
const TICK: Duration = Duration::from_millis(500);
/// The shortest time between two lines.
const LINE: Duration = Duration::from_secs(10);
/// How long a warning that goes on is not said again in lines.
const REPEAT: Duration = Duration::from_secs(300);

/// The progress of one run. Dropping it leaves the terminal as a program that writes lines would.
pub(crate) struct Progress {
    shared: Arc<Mutex<Shared>>,
    ticker: Option<JoinHandle<()>>,
}

/// What the run and the thread that keeps the clock going both touch.
struct Shared {
    course: Course,
    begin: Instant,
    view: View,
}

enum View {
    Off,
    Lines { last: Option<Duration> },
    Dashboard { screen: Screen, last: Duration },
}

impl Progress {
    /// The progress of `recipe` over the steps after `range.start` up to `range.end`.
    pub(crate) fn start(recipe: &'static str, range: Range<u64>, mode: ProgressMode) -> Self {
        let view = match mode {
            ProgressMode::Off => View::Off,
            ProgressMode::Lines => View::Lines { last: None },
            ProgressMode::Auto | ProgressMode::Dashboard => match Screen::open() {
                Some(screen) => View::Dashboard {
                    screen,
                    last: Duration::ZERO,
                },
                None => View::Lines { last: None },
            },
        };
        let live = matches!(view, View::Dashboard { .. });
        let mut shared = Shared {
            course: Course::new(recipe, range),
            begin: Instant::now(),
            view,
        };
        shared.draw();
        let shared = Arc::new(Mutex::new(shared));
        let ticker = live.then(|| {
            stop_before_a_panic_is_said(Arc::downgrade(&shared));
            tick(&shared)
        });
        Self { shared, ticker }
    }

    /// Says what the run does now, until the next step or phase.
    pub(crate) fn phase(&self, name: &'static str) {
        let mut shared = self.lock();
        shared.course.phase = Some(name);
        shared.draw_if_due();
    }

    /// Takes a finished step in; a warning is said when it first fires, and now and then while it goes on.
    pub(crate) fn step(&self, step: u64, numbers: StepNumbers, warnings: &[String]) {
        let mut shared = self.lock();
        let now = shared.begin.elapsed();
        shared.course.step(step, now, numbers);
        shared.warn(warnings);
        match &shared.view {
            View::Dashboard { .. } => shared.draw_if_due(),
            View::Lines { last } => {
                let due = last.is_none_or(|last| now >= last + LINE);
                if due || step == shared.course.steps() {
                    say(&words::line(&shared.course, now));
                    shared.view = View::Lines { last: Some(now) };
                }
            }
            View::Off => {}
        }
    }

    /// Says what is wrong before the first step, or beside one.
    pub(crate) fn warn(&self, warnings: &[String]) {
        let mut shared = self.lock();
        shared.warn(warnings);
        shared.draw_if_due();
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        {
            let mut shared = self.lock();
            shared.course.phase = None;
            shared.draw();
            shared.view = View::Off;
        }
        if let Some(ticker) = self.ticker.take() {
            ticker.thread().unpark();
            let _ = ticker.join();
        }
    }
}

impl Shared {
    fn warn(&mut self, warnings: &[String]) {
        let now = self.begin.elapsed();
        for warning in warnings {
            let notice = self.course.warn(warning, now);
            if let (View::Lines { .. }, Some(notice)) = (&self.view, notice) {
                say(&words::notice(notice));
            }
        }
    }

    fn draw_if_due(&mut self) {
        let now = self.begin.elapsed();
        if let View::Dashboard { last, .. } = &self.view
            && now >= *last + REDRAW
        {
            self.draw();
        }
    }

    fn draw(&mut self) {
        let now = self.begin.elapsed();
        if let View::Dashboard { screen, last } = &mut self.view {
            *last = now;
            let (columns, rows) = screen.size();
            screen.draw(&panel::render(&self.course, now, columns, rows));
        }
    }
}

/// A panic elsewhere must not stop the terminal from being left in order.
fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tick(shared: &Arc<Mutex<Shared>>) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        loop {
            std::thread::park_timeout(TICK);
            let mut shared = lock(&shared);
            match shared.view {
                View::Dashboard { .. } => shared.draw_if_due(),
                _ => return,
            }
        }
    })
}

/// The message of a panic is printed before anything is dropped: a dashboard drawn after it would wipe it out.
fn stop_before_a_panic_is_said(shared: Weak<Mutex<Shared>>) {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if let Some(shared) = shared.upgrade()
            && let Ok(mut shared) = shared.try_lock()
        {
            shared.view = View::Off;
        }
        say(panic);
    }));
}

/// One line on standard error. Who has closed it wants none.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// What scoring before the first step tells its progress to: a bar over `groups`, cleared at the end, or lines.
pub(crate) fn scoring(name: &'static str, groups: usize, mode: ProgressMode) -> impl FnMut(usize) {
    let drawn = matches!(mode, ProgressMode::Auto | ProgressMode::Dashboard);
    let bar = (drawn && Screen::open().is_some()).then(|| bar(name, groups as u64));
    let mut last = Instant::now();
    move |done| match &bar {
        Some(bar) if done < groups => bar.set_position(done as u64),
        Some(bar) => bar.finish_and_clear(),
        None if mode != ProgressMode::Off && last.elapsed() >= LINE => {
            last = Instant::now();
            say(&format!("{name} {done}/{groups}"));
        }
        None => {}
    }
}

fn bar(name: &'static str, groups: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} eta {eta}");
    let bar = ProgressBar::new(groups).with_prefix(name);
    bar.with_style(style.expect("the template is fixed"))
}
