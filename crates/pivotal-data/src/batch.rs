//! The order of a data set over epochs, and where one stands in it.

use pivotal_core::random_stream;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};

/// In which order an epoch visits the items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As they stand.
    Sequential,
    /// Shuffled anew every epoch.
    Shuffled,
    /// Shuffled, then sorted by length inside windows of so many batches, then the batches shuffled: items of a batch are
    /// of similar length, and which ones meet still changes every epoch.
    LengthGrouped {
        /// Batches in a window, at least 1.
        window_batches: usize,
    },
}

/// How batches are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Seed of the order.
    pub seed: u64,
    /// Items in a batch, at least 1; the last batch of an epoch takes what is left.
    pub items_per_batch: usize,
    /// The order of an epoch.
    pub order: Order,
}

/// Where one stands: before batch `batch` of epoch `epoch`, both from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// The epoch.
    pub epoch: u64,
    /// The next batch in it.
    pub batch: usize,
}

/// One batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The epoch it belongs to.
    pub epoch: u64,
    /// Indices into the data, in order.
    pub items: Vec<usize>,
}

/// Batches without end, epoch after epoch: an iterator that can be put back to any [`Cursor`].
///
/// The order depends on the seed, the epoch, the options and the lengths alone; not on the platform or what was drawn
/// before.
///
/// # Examples
/// ```
/// use pivotal_data::{BatchOptions, Batcher, Cursor, Order};
/// let options = BatchOptions { seed: 7, items_per_batch: 2, order: Order::Shuffled };
/// let mut batcher = Batcher::new(vec![1; 5], options, Cursor::default())?;
/// let first: Vec<_> = batcher.by_ref().take(4).collect();
/// assert_eq!(batcher.cursor(), Cursor { epoch: 1, batch: 1 });
/// let mut resumed = Batcher::new(vec![1; 5], options, Cursor { epoch: 0, batch: 2 })?;
/// assert_eq!(resumed.next().as_ref(), Some(&first[2]));
/// # Ok::<(), pivotal_data::DataError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Batcher {
    lengths: Vec<usize>,
    options: BatchOptions,
    cursor: Cursor,
    epoch_batches: Vec<Vec<usize>>,
}

impl Batcher {
    /// Batches over items of these `lengths` (only [`Order::LengthGrouped`] reads them), from `cursor` on.
    ///
    /// # Errors
    /// [`DataError::Zero`] without items or with a batch or window of 0; [`DataError::CursorRange`] for a cursor beyond
    /// its epoch.
    pub fn new(lengths: Vec<usize>, options: BatchOptions, cursor: Cursor) -> Result<Self> {
        let zero = |name, value| match value {
            0 => Err(DataError::Zero { name }),
            _ => Ok(()),
        };
        zero("items", lengths.len())?;
        zero("items_per_batch", options.items_per_batch)?;
        if let Order::LengthGrouped { window_batches } = options.order {
            zero("window_batches", window_batches)?;
        }
        let epoch_batches = epoch_batches(&lengths, options, cursor.epoch);
        if cursor.batch >= epoch_batches.len() {
            return Err(DataError::CursorRange {
                batch: cursor.batch,
                batches: epoch_batches.len(),
            });
        }
        Ok(Self {
            lengths,
            options,
            cursor,
            epoch_batches,
        })
    }

    /// Where the next batch stands.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Batches in an epoch.
    pub fn batches_per_epoch(&self) -> usize {
        self.epoch_batches.len()
    }
}

impl Iterator for Batcher {
    type Item = Batch;

    /// The next batch; there always is one.
    fn next(&mut self) -> Option<Batch> {
        let batch = Batch {
            epoch: self.cursor.epoch,
            items: self.epoch_batches[self.cursor.batch].clone(),
        };
        self.cursor.batch += 1;
        if self.cursor.batch == self.epoch_batches.len() {
            self.cursor = Cursor {
                epoch: self.cursor.epoch + 1,
                batch: 0,
            };
            self.epoch_batches = epoch_batches(&self.lengths, self.options, self.cursor.epoch);
        }
        Some(batch)
    }
}

fn epoch_batches(lengths: &[usize], options: BatchOptions, epoch: u64) -> Vec<Vec<usize>> {
    let mut stream = random_stream(options.seed, &format!("data order, epoch {epoch}"));
    let mut items: Vec<usize> = (0..lengths.len()).collect();
    let size = options.items_per_batch;
    let batches = |items: &[usize]| items.chunks(size).map(<[usize]>::to_vec).collect();
    match options.order {
        Order::Sequential => batches(&items),
        Order::Shuffled => {
            shuffle(&mut items, &mut stream);
            batches(&items)
        }
        Order::LengthGrouped { window_batches } => {
            shuffle(&mut items, &mut stream);
            for window in items.chunks_mut(size.saturating_mul(window_batches)) {
                window.sort_by_key(|&item| lengths[item]);
            }
            let mut grouped: Vec<Vec<usize>> = batches(&items);
            shuffle(&mut grouped, &mut stream);
            grouped
        }
    }
}

/// Fisher and Yates, with 64-bit draws on every platform.
fn shuffle<T>(items: &mut [T], stream: &mut impl Rng) {
    for end in (1..items.len()).rev() {
        items.swap(end, below(end as u64 + 1, stream) as usize);
    }
}

/// A uniform draw from `0..bound`: draws from the incomplete last stretch of the 64-bit range are thrown away.
fn below(bound: u64, stream: &mut impl Rng) -> u64 {
    let complete = u64::MAX - u64::MAX % bound;
    loop {
        let draw = stream.next_u64();
        if draw < complete {
            return draw % bound;
        }
    }
}
