//! Reading JSONL line by line, within a limit on the line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use pivotal_core::FileError;

use crate::error::{DataError, Result, RowFault};
use crate::json::Json;
use crate::sample::{Row, Shape, parse_sample};

/// How a data set is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// The longest line accepted, in bytes; a longer one is an error and is not read to its end.
    pub max_line_bytes: usize,
    /// Rows after which reading stops; `None` reads all.
    pub max_rows: Option<usize>,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            max_line_bytes: 16 << 20,
            max_rows: None,
        }
    }
}

/// Rows of a JSONL data set, one at a time: an iterator that ends at the first fault.
///
/// A row's number is its line, from 1. A byte-order mark, CRLF line ends and blank lines are accepted; all rows must have
/// one [`Shape`].
///
/// # Examples
/// ```
/// use pivotal_data::{JsonlReader, ReadOptions, Sample};
/// let text = "\u{feff}{\"prompt\": \"1+1=\"}\r\n\r\n{\"prompt\": \"2+2=\"}";
/// let rows: Vec<_> = JsonlReader::new("prompts.jsonl", text.as_bytes(), ReadOptions::default())
///     .collect::<Result<_, _>>()?;
/// assert_eq!([rows[0].row, rows[1].row], [1, 3]);
/// # Ok::<(), pivotal_data::DataError>(())
/// ```
pub struct JsonlReader<R> {
    path: PathBuf,
    input: R,
    options: ReadOptions,
    line: Vec<u8>,
    row: u64,
    rows: usize,
    shape: Option<Shape>,
    ended: bool,
}

impl JsonlReader<BufReader<File>> {
    /// Opens a file.
    ///
    /// # Errors
    /// [`DataError::File`] if it cannot be opened.
    pub fn open(path: &Path, options: ReadOptions) -> Result<Self> {
        let file = File::open(path).map_err(|source| FileError::Read {
            path: path.into(),
            source,
        })?;
        Ok(Self::new(path, BufReader::new(file), options))
    }
}

impl<R: BufRead> JsonlReader<R> {
    /// Reads `input`; errors call it `path`.
    pub fn new(path: impl Into<PathBuf>, input: R, options: ReadOptions) -> Self {
        Self {
            path: path.into(),
            input,
            options,
            line: Vec::new(),
            row: 0,
            rows: 0,
            shape: None,
            ended: false,
        }
    }

    /// The shape of the rows read so far; `None` before the first.
    pub fn shape(&self) -> Option<Shape> {
        self.shape
    }

    fn next_row(&mut self) -> Result<Option<Row>> {
        while self.options.max_rows.is_none_or(|limit| self.rows < limit) && self.read_line()? {
            self.row += 1;
            if let Some(row) = self.parse_line().map_err(|fault| self.fault(fault))? {
                self.rows += 1;
                return Ok(Some(row));
            }
        }
        Ok(None)
    }

    fn read_line(&mut self) -> Result<bool> {
        self.line.clear();
        // Two bytes of grace, for the line end itself.
        let limit = self.options.max_line_bytes as u64 + 2;
        let read = (&mut self.input)
            .take(limit)
            .read_until(b'\n', &mut self.line)
            .map_err(|source| FileError::Read {
                path: self.path.clone(),
                source,
            })?;
        for end in [b'\n', b'\r'] {
            if self.line.last() == Some(&end) {
                self.line.pop();
            }
        }
        if self.line.len() > self.options.max_line_bytes {
            self.row += 1;
            return Err(self.fault(RowFault::LineTooLong {
                limit_bytes: self.options.max_line_bytes,
            }));
        }
        Ok(read > 0)
    }

    fn parse_line(&mut self) -> Result<Option<Row>, RowFault> {
        let bom: &[u8] = if self.row == 1 { b"\xef\xbb\xbf" } else { b"" };
        let bytes = self.line.strip_prefix(bom).unwrap_or(&self.line);
        let skipped = self.line.len() - bytes.len();
        let text = std::str::from_utf8(bytes).map_err(|error| RowFault::NotUtf8 {
            byte: error.valid_up_to() + 1 + skipped,
        })?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let value: Json = serde_json::from_str(text).map_err(|error| RowFault::Json {
            byte: error.column() + skipped,
            detail: bare_message(&error),
        })?;
        let Json::Object(columns) = value else {
            return Err(RowFault::Json {
                byte: 1 + skipped,
                detail: format!("expected an object, got {}", value.type_name()),
            });
        };
        let (shape, sample) = parse_sample(columns)?;
        match self.shape {
            Some(expected) if expected != shape => Err(RowFault::MixedShapes {
                expected,
                found: shape,
            }),
            _ => {
                self.shape = Some(shape);
                Ok(Some(Row {
                    row: self.row,
                    sample,
                }))
            }
        }
    }

    fn fault(&self, fault: RowFault) -> DataError {
        DataError::Row {
            path: self.path.clone(),
            row: self.row,
            fault,
        }
    }
}

impl<R: BufRead> Iterator for JsonlReader<R> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let row = self.next_row().transpose();
        self.ended = !matches!(row, Some(Ok(_)));
        row
    }
}

/// The parser's message without its " at line 1 column 7": the row and the byte are said elsewhere.
fn bare_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
