//! How much address space this process has ever asked for: an allocation from an unchecked length shows, touched or not.

/// The growth of the process's peak address space over `work`, in bytes; 0 where the system does not tell.
pub(crate) fn peak_growth(work: impl FnOnce()) -> u64 {
    let before = peak();
    work();
    peak().saturating_sub(before)
}

fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.map_or(0, |number| number.parse::<u64>().unwrap() * 1024)
}
