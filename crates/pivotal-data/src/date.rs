//! The date that a chat template may write into its prompt.

use std::fmt::Write;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// A day of the Gregorian calendar.
///
/// Templates ask for today's date through `strftime_now`; here it is given, so that a run can be repeated tomorrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    year: u16,
    month: u8,
    day: u8,
}

impl Date {
    /// A day; `None` if there is none of that name between the years 1 and 9999.
    ///
    /// # Examples
    /// ```
    /// use pivotal_data::Date;
    /// assert!(Date::new(2024, 2, 29).is_some());
    /// assert!(Date::new(2025, 2, 29).is_none());
    /// ```
    pub fn new(year: u16, month: u8, day: u8) -> Option<Self> {
        let leap = year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
        let days = match month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        ((1..=9999).contains(&year) && (1..=days).contains(&day)).then_some(Self {
            year,
            month,
            day,
        })
    }

    /// The date in `strftime`'s format, at midnight; `None` if the format has a directive other than
    /// `%d %e %m %B %b %Y %y %A %a %H %M %S %%`.
    ///
    /// # Examples
    /// ```
    /// let date = pivotal_data::Date::new(2024, 7, 26).unwrap();
    /// assert_eq!(date.format("%a %d %b %Y").as_deref(), Some("Fri 26 Jul 2024"));
    /// ```
    pub fn format(self, format: &str) -> Option<String> {
        let mut text = String::new();
        let mut characters = format.chars();
        while let Some(character) = characters.next() {
            if character != '%' {
                text.push(character);
                continue;
            }
            let month = MONTHS[usize::from(self.month) - 1];
            let written = match characters.next()? {
                'd' => write!(text, "{:02}", self.day),
                'e' => write!(text, "{:2}", self.day),
                'm' => write!(text, "{:02}", self.month),
                'B' => write!(text, "{month}"),
                'b' => write!(text, "{}", &month[..3]),
                'Y' => write!(text, "{:04}", self.year),
                'y' => write!(text, "{:02}", self.year % 100),
                'A' => write!(text, "{}", self.weekday()),
                'a' => write!(text, "{}", &self.weekday()[..3]),
                'H' | 'M' | 'S' => write!(text, "00"),
                '%' => write!(text, "%"),
                _ => return None,
            };
            written.ok()?;
        }
        Some(text)
    }

    /// Sakamoto's method: day of the week from the shifted year and a table of month offsets.
    fn weekday(self) -> &'static str {
        const OFFSETS: [u32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = u32::from(self.year) - u32::from(self.month < 3);
        let sum = year + year / 4 - year / 100
            + year / 400
            + OFFSETS[usize::from(self.month) - 1]
            + u32::from(self.day);
        // The method counts from Sunday, the table from Monday.
        DAYS[((sum + 6) % 7) as usize]
    }
}
