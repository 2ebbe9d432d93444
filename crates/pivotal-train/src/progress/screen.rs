//! A few lines of a terminal that are drawn again and again, below what it holds already.
//!
//! Nothing has to be put back afterwards: the cursor stays where it is seen, on the line below the drawing, no mode of
//! the terminal is changed, and each drawing goes out in one piece that ends without a colour. A process killed at any
//! moment leaves a terminal in order.

use std::fmt::Write;

use console::Term;
use ratatui::buffer::{Buffer, Cell};
use ratatui::style::{Color, Modifier};

/// The part of the terminal that is ours.
pub(super) struct Screen {
    term: Term,
    colors: bool,
    /// Columns of each line that was drawn last.
    drawn: Vec<usize>,
}

impl Screen {
    /// Standard error, if it is a terminal in which a cursor can move.
    pub(super) fn open() -> Option<Self> {
        let term = Term::stderr();
        let drawable = term.features().is_attended() && term.size_checked().is_some();
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        (drawable && !dumb).then(|| Self {
            term,
            colors: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            drawn: Vec::new(),
        })
    }

    /// Columns and rows that a drawing may take: the last column would wrap, and the last row is the cursor's.
    pub(super) fn size(&self) -> (u16, u16) {
        let (rows, columns) = self.term.size();
        (columns.saturating_sub(1), rows.saturating_sub(1))
    }

    /// Draws over what was drawn before. A terminal that is gone is no reason to stop.
    pub(super) fn draw(&mut self, frame: &Buffer) {
        let width = usize::from(self.term.size().1);
        let mut bytes = start_again(&self.drawn, width);
        self.drawn.clear();
        for row in rows(frame) {
            self.drawn.push(row.len());
            write_row(&mut bytes, row, self.colors);
            bytes.push_str("\x1b[K\n");
        }
        bytes.push_str("\x1b[J");
        let mut term = &self.term;
        let _ = std::io::Write::write_all(&mut term, bytes.as_bytes());
        let _ = self.term.flush();
    }
}

/// Back to where the last drawing began. A terminal that has become narrower has broken its lines.
fn start_again(drawn: &[usize], width: usize) -> String {
    let rows: usize = drawn
        .iter()
        .map(|&columns| columns.div_ceil(width.max(1)).max(1))
        .sum();
    match rows {
        0 => String::new(),
        rows => format!("\x1b[{rows}A\r"),
    }
}

/// The rows of a frame, without the blanks at their ends.
pub(super) fn rows(frame: &Buffer) -> impl Iterator<Item = &[Cell]> {
    let width = usize::from(frame.area.width).max(1);
    frame.content.chunks(width).map(|row| {
        let blank = |cell: &Cell| cell.symbol() == " " && cell.bg == Color::Reset;
        let end = row.iter().rposition(|cell| !blank(cell));
        &row[..end.map_or(0, |end| end + 1)]
    })
}

fn write_row(bytes: &mut String, row: &[Cell], colors: bool) {
    let mut style = (Color::Reset, Modifier::empty());
    for cell in row {
        let next = (cell.fg, cell.modifier);
        if colors && next != style {
            bytes.push_str("\x1b[0");
            for code in codes(next) {
                let _ = write!(bytes, ";{code}");
            }
            bytes.push('m');
            style = next;
        }
        bytes.push_str(cell.symbol());
    }
    if style != (Color::Reset, Modifier::empty()) {
        bytes.push_str("\x1b[0m");
    }
}

/// The codes of the few styles that the panel has.
fn codes((color, modifier): (Color, Modifier)) -> impl Iterator<Item = u8> {
    let color = match color {
        Color::Green => Some(32),
        Color::Yellow => Some(33),
        Color::Cyan => Some(36),
        Color::DarkGray => Some(90),
        _ => None,
    };
    color
        .into_iter()
        .chain(modifier.contains(Modifier::BOLD).then_some(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drawing_begins_where_the_last_one_did_even_in_a_narrower_terminal() {
        assert_eq!(start_again(&[], 80), "");
        assert_eq!(start_again(&[79, 0, 12], 80), "\x1b[3A\r");
        assert_eq!(start_again(&[79, 0, 12], 40), "\x1b[4A\r");
    }

    #[test]
    fn colours_end_with_their_row_and_can_be_left_out() {
        let mut row = vec![Cell::new("a"), Cell::new("b"), Cell::new("c")];
        row[1].set_fg(Color::Cyan);
        row[2].set_fg(Color::Cyan).modifier = Modifier::BOLD;
        let (mut with, mut without) = (String::new(), String::new());
        write_row(&mut with, &row, true);
        write_row(&mut without, &row, false);
        assert_eq!(with, "a\x1b[0;36mb\x1b[0;36;1mc\x1b[0m");
        assert_eq!(without, "abc");
    }
}
