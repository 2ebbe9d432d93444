//! A data set in memory: its rows and the shape they share.

use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};
use crate::jsonl::{JsonlReader, ReadOptions};
use crate::sample::{Row, Shape};

/// The rows of a data set, all of one shape.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSet {
    path: PathBuf,
    shape: Shape,
    rows: Vec<Row>,
}

impl DataSet {
    /// Reads a JSONL file.
    ///
    /// # Errors
    /// [`DataError::Row`] naming the row and the column at fault, [`DataError::NoRows`], [`DataError::File`].
    pub fn read(path: &Path, options: ReadOptions) -> Result<Self> {
        Self::collect(path, JsonlReader::open(path, options)?)
    }

    /// Reads JSONL from memory; errors call it `name`.
    ///
    /// # Errors
    /// Those of [`DataSet::read`].
    ///
    /// # Examples
    /// ```
    /// use pivotal_data::{DataSet, Shape};
    /// let line = r#"{"chosen": "Sky? Blue", "rejected": "Sky? Green"}"#;
    /// let data = DataSet::from_jsonl("inline", line)?;
    /// assert_eq!(data.shape(), Shape::ImplicitPreferenceText);
    /// # Ok::<(), pivotal_data::DataError>(())
    /// ```
    pub fn from_jsonl(name: &str, text: &str) -> Result<Self> {
        let reader = JsonlReader::new(name, text.as_bytes(), ReadOptions::default());
        Self::collect(Path::new(name), reader)
    }

    fn collect<R: std::io::BufRead>(path: &Path, mut reader: JsonlReader<R>) -> Result<Self> {
        let rows: Vec<Row> = reader.by_ref().collect::<Result<_>>()?;
        let shape = reader
            .shape()
            .ok_or_else(|| DataError::NoRows { path: path.into() })?;
        Ok(Self {
            path: path.into(),
            shape,
            rows,
        })
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The shape all rows share.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The rows, in file order; at least one.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}
