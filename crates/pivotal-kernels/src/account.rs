//! Where the time goes: seconds by part of a step, for whoever wants a table of them.
//!
//! Off, a timed call costs one relaxed load. On, guards nest, and what an inner one takes is not the outer one's: no
//! moment is counted twice. Time is that of the thread that calls, forks and their join included, so guards belong around
//! a parallel kernel and never inside one. The totals are the process's: one account at a time.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What a moment of a step is spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Products with the weights of linear layers, and their gradients.
    Linear,
    /// Products with low-rank factors, and their gradients.
    Lora,
    /// The head: logits, log-probabilities and their gradient.
    Head,
    /// Attention itself, without the projections.
    Attention,
    /// Norms.
    Norm,
    /// Rotary embedding.
    Rope,
    /// The gated activation.
    Swiglu,
    /// A frozen layer's perceptron in one pass: norm, products, gated activation, residual sum.
    Mlp,
    /// Sums of the residual stream that stand alone.
    Residual,
    /// Making a batch: tree packing, layouts, gathers.
    Pack,
    /// Norm of the gradient, clipping, the update.
    Optimizer,
    /// From a signal to a mask.
    Credit,
    /// What was timed and is none of these.
    Other,
}

impl Part {
    /// Every part, in the order of [`take`].
    pub const ALL: [Self; 13] = [
        Self::Linear,
        Self::Lora,
        Self::Head,
        Self::Attention,
        Self::Norm,
        Self::Rope,
        Self::Swiglu,
        Self::Mlp,
        Self::Residual,
        Self::Pack,
        Self::Optimizer,
        Self::Credit,
        Self::Other,
    ];

    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Lora => "lora",
            Self::Head => "head",
            Self::Attention => "attention",
            Self::Norm => "norm",
            Self::Rope => "rope",
            Self::Swiglu => "swiglu",
            Self::Mlp => "mlp",
            Self::Residual => "residual",
            Self::Pack => "pack",
            Self::Optimizer => "optimizer",
            Self::Credit => "credit",
            Self::Other => "other",
        }
    }
}

static ACTIVE: AtomicBool = AtomicBool::new(false);
static NANOSECONDS: [AtomicU64; Part::ALL.len()] = [const { AtomicU64::new(0) }; Part::ALL.len()];

thread_local! {
    /// Nanoseconds of the guards that closed inside the one now open.
    static INNER: Cell<u64> = const { Cell::new(0) };
}

/// Begins an account: every part from zero.
pub fn start() {
    NANOSECONDS.iter().for_each(|part| part.store(0, Relaxed));
    ACTIVE.store(true, Relaxed);
}

/// Ends the account: how long each part took, one entry for each of [`Part::ALL`].
///
/// # Examples
/// ```
/// use pivotal_kernels::account::{Part, start, take, time};
/// start();
/// assert_eq!(time(Part::Optimizer, || 6 * 7), 42);
/// let parts = take();
/// let (part, duration) = parts[Part::Optimizer as usize];
/// assert!(part == Part::Optimizer && !duration.is_zero());
/// assert!(parts[Part::Credit as usize].1.is_zero());
/// ```
pub fn take() -> Vec<(Part, Duration)> {
    ACTIVE.store(false, Relaxed);
    let taken = |part: Part| Duration::from_nanos(NANOSECONDS[part as usize].swap(0, Relaxed));
    Part::ALL.map(|part| (part, taken(part))).to_vec()
}

/// Runs `body`; what it takes, less what guards inside it take, is `part`'s while an account is open.
#[inline]
pub fn time<T>(part: Part, body: impl FnOnce() -> T) -> T {
    if !ACTIVE.load(Relaxed) {
        return body();
    }
    let _guard = Guard::open(part);
    body()
}

/// Closes when it is dropped, a panic included.
struct Guard {
    part: Part,
    begin: Instant,
    /// What had closed inside the guard around this one before this one opened.
    before: u64,
}

impl Guard {
    fn open(part: Part) -> Self {
        Self {
            part,
            before: INNER.replace(0),
            begin: Instant::now(),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let nanoseconds = u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let inner = INNER.replace(self.before.saturating_add(nanoseconds));
        NANOSECONDS[self.part as usize].fetch_add(nanoseconds.saturating_sub(inner), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::{Mutex, PoisonError};
    use std::thread::sleep;

    /// The account is the process's.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    const WHILE: Duration = Duration::from_millis(5);

    fn seconds(parts: &[(Part, Duration)], part: Part) -> Duration {
        parts[part as usize].1
    }

    #[test]
    fn a_moment_is_counted_once_however_deep_the_guards_nest() {
        let _lock = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        start();
        let begin = Instant::now();
        time(Part::Other, || {
            sleep(WHILE);
            time(Part::Linear, || {
                sleep(WHILE);
                time(Part::Lora, || sleep(WHILE));
                time(Part::Linear, || sleep(WHILE));
            });
            time(Part::Lora, || sleep(WHILE));
        });
        let whole = begin.elapsed();
        let parts = take();
        assert!(seconds(&parts, Part::Other) >= WHILE, "{parts:?}");
        assert!(seconds(&parts, Part::Linear) >= 2 * WHILE, "{parts:?}");
        assert!(seconds(&parts, Part::Lora) >= 2 * WHILE, "{parts:?}");
        let sum: Duration = parts.iter().map(|(_, duration)| *duration).sum();
        assert!(sum <= whole, "{sum:?} of {whole:?}");
        assert!(sum >= 5 * WHILE, "{parts:?}");
    }

    #[test]
    fn nothing_is_counted_outside_an_account_and_a_new_one_starts_from_zero() {
        let _lock = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = |parts: &[(Part, Duration)]| parts.iter().all(|(_, time)| time.is_zero());
        start();
        time(Part::Norm, || sleep(WHILE));
        start();
        assert!(empty(&take()));
        time(Part::Norm, || sleep(WHILE));
        assert!(empty(&take()));
    }

    #[test]
    fn a_panic_closes_its_guards() {
        let _lock = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        start();
        let begin = Instant::now();
        let inner = || time(Part::Head, || panic!("as planned"));
        let outcome = catch_unwind(AssertUnwindSafe(|| time(Part::Other, inner)));
        assert!(outcome.is_err());
        time(Part::Credit, || sleep(WHILE));
        let whole = begin.elapsed();
        let parts = take();
        assert!(!seconds(&parts, Part::Head).is_zero());
        assert!(seconds(&parts, Part::Credit) >= WHILE, "{parts:?}");
        assert!(parts.iter().map(|(_, time)| *time).sum::<Duration>() <= whole);
    }

    #[test]
    fn names_are_distinct_and_the_order_is_that_of_the_account() {
        for (index, part) in Part::ALL.into_iter().enumerate() {
            assert_eq!(part as usize, index);
            let same = |other: &&Part| other.name() == part.name();
            assert_eq!(Part::ALL.iter().filter(same).count(), 1);
        }
    }
}
