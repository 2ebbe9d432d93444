//! Statistics over plain slices: what every table, warning and interval of the workspace is computed with.
//!
//! Functions return `None` where the data leaves the quantity undefined (the mean of nothing, the spread of one value);
//! nothing divides by zero and no NaN stands for "unknown". Values are taken as finite: NaN is refused where it enters.

mod auc;
mod interval;
mod student;
mod summary;

pub use auc::{auc, weighted_auc};
pub use interval::{Comparison, Interval, mean_interval, paired_difference, proportion_interval};
pub use student::{student_t_critical, student_t_p_value};
pub use summary::{
    Moments, mean, median, median_absolute_deviation, quantile, quantile_of_sorted,
    standard_deviation, standard_error,
};
