//! A TOML document whose every complaint says file, line and column.
//!
//! Values are walked by hand on the parser's tree of spans rather than deserialised, so that each
//! message can name the table it is about, the key that was meant, and what to write instead.

use super::units::excerpt;
use crate::error::{ErrorId, Refusal};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Keys that a later version will understand, wherever they stand.
const RESERVED: [&str; 6] = [
    "arbiter",
    "agent-port",
    "keys-dir",
    "secondary-export",
    "on-lost-right",
    "max-loss",
];

/// Tables that a later version will understand.
const RESERVED_TABLES: [&str; 2] = ["group", "monitor"];

/// The text and its name, for messages.
#[derive(Clone, Copy)]
pub(super) struct Document<'t> {
    pub text: &'t str,
    pub origin: &'t Path,
}

impl<'t> Document<'t> {
    /// A refusal that points at a byte of the document.
    pub fn refuse(&self, at: usize, id: ErrorId, message: impl fmt::Display) -> Refusal {
        let (line, column) = self.position(at);
        let origin = self.origin.display();
        Refusal::new(id, format!("{origin}:{line}:{column}: {message}"))
    }

    pub fn line(&self, at: usize) -> usize {
        self.position(at).0
    }

    /// Line and column of a byte, both from 1; columns count characters.
    fn position(&self, at: usize) -> (usize, usize) {
        let mut at = at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        let before = &self.text[..at];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.bytes().filter(|&byte| byte == b'\n').count() + 1;
        (line, before[line_start..].chars().count() + 1)
    }

    /// Parses the text and hands its tree to `walk`.
    pub fn parse<R>(
        &self,
        walk: impl FnOnce(&Spanned<DeTable<'_>>) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        let tree = DeTable::parse(self.text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let what = one_line(error.message());
            self.refuse(
                at,
                ErrorId::ConfigSyntax,
                format!("{what}; correct the TOML here"),
            )
        })?;
        walk(&tree)
    }
}

/// A table of the document with only known keys in it.
pub(super) struct Table<'t> {
    doc: Document<'t>,
    entries: &'t DeTable<'t>,
    span: Range<usize>,
    name: String,
}

impl<'t> Table<'t> {
    /// A table whose keys must be among `known`.
    pub fn new(
        doc: Document<'t>,
        entries: &'t DeTable<'t>,
        span: Range<usize>,
        name: String,
        known: &[&str],
    ) -> Result<Table<'t>, Refusal> {
        // The earliest complaint first: the tree is sorted by key, people read by line.
        let unknown = entries
            .keys()
            .filter(|key| !known.contains(&key.get_ref().as_ref()))
            .min_by_key(|key| key.span().start);
        if let Some(key) = unknown {
            return Err(unknown_key(
                doc,
                key.get_ref(),
                key.span().start,
                &name,
                known,
            ));
        }
        Ok(Table {
            doc,
            entries,
            span,
            name,
        })
    }

    /// Where the table starts.
    pub fn at(&self) -> usize {
        self.span.start
    }

    pub fn optional(&self, key: &str) -> Option<Value<'t>> {
        self.entries.get(key).map(|value| Value {
            doc: self.doc,
            value,
            name: format!("`{key}` of {}", self.name),
        })
    }

    pub fn required(&self, key: &str, example: &str) -> Result<Value<'t>, Refusal> {
        self.optional(key).ok_or_else(|| {
            let name = &self.name;
            self.doc.refuse(
                self.at(),
                ErrorId::ConfigSyntax,
                format!("{name} has no `{key}`; add one, like {key} = {example}"),
            )
        })
    }

    /// The tables of an array of tables; none if it is absent.
    pub fn tables(&self, key: &str) -> Result<Vec<Value<'t>>, Refusal> {
        let Some(value) = self.entries.get(key) else {
            return Ok(Vec::new());
        };
        match value.get_ref() {
            DeValue::Array(items) => Ok(items
                .iter()
                .map(|value| Value {
                    doc: self.doc,
                    value,
                    name: format!("[[{key}]]"),
                })
                .collect()),
            _ => Err(self.doc.refuse(
                value.span().start,
                ErrorId::ConfigSyntax,
                format!("`{key}` must be a list of tables; write [[{key}]] above each"),
            )),
        }
    }
}

/// A value of the document and what it is called in messages.
pub(super) struct Value<'t> {
    doc: Document<'t>,
    value: &'t Spanned<DeValue<'t>>,
    name: String,
}

impl<'t> Value<'t> {
    pub fn at(&self) -> usize {
        self.value.span().start
    }

    /// A refusal that points at this value.
    pub fn refuse(&self, id: ErrorId, message: impl fmt::Display) -> Refusal {
        self.doc
            .refuse(self.at(), id, format!("{}: {message}", self.name))
    }

    pub fn string(&self) -> Result<&'t str, Refusal> {
        match self.value.get_ref() {
            DeValue::String(text) => Ok(text),
            _ => Err(self.wrong_type("a string in quotes")),
        }
    }

    pub fn boolean(&self) -> Result<bool, Refusal> {
        match self.value.get_ref() {
            DeValue::Boolean(value) => Ok(*value),
            _ => Err(self.wrong_type("true or false")),
        }
    }

    /// An integer of 128 bits at most; `None` for a longer one.
    pub fn integer(&self) -> Result<Option<i128>, Refusal> {
        match self.value.get_ref() {
            DeValue::Integer(number) => {
                Ok(i128::from_str_radix(number.as_str(), number.radix()).ok())
            }
            _ => Err(self.wrong_type("a number")),
        }
    }

    pub fn array(&self) -> Result<Vec<Value<'t>>, Refusal> {
        match self.value.get_ref() {
            DeValue::Array(items) => Ok(items
                .iter()
                .map(|value| Value {
                    doc: self.doc,
                    value,
                    name: self.name.clone(),
                })
                .collect()),
            _ => Err(self.wrong_type("a list in brackets")),
        }
    }

    pub fn table(&self, known: &[&str]) -> Result<Table<'t>, Refusal> {
        match self.value.get_ref() {
            DeValue::Table(entries) => Table::new(
                self.doc,
                entries,
                self.value.span(),
                self.name.clone(),
                known,
            ),
            _ => Err(self.wrong_type("a table")),
        }
    }

    /// One string, or a table from node to string.
    pub fn per_node(&self) -> Result<PerNode<'t>, Refusal> {
        match self.value.get_ref() {
            DeValue::String(_) => Ok(PerNode::All(self.clone())),
            DeValue::Table(entries) => {
                let mut each: Vec<NodeValue<'t>> = entries
                    .iter()
                    .map(|(node, value)| NodeValue {
                        node: node.get_ref(),
                        node_at: node.span().start,
                        value: Value {
                            doc: self.doc,
                            value,
                            name: format!("{}, node `{}`", self.name, excerpt(node.get_ref())),
                        },
                    })
                    .collect();
                each.sort_by_key(|entry| entry.node_at);
                Ok(PerNode::Each(each))
            }
            _ => Err(self.wrong_type("a string for all nodes or a table with one per node")),
        }
    }

    fn wrong_type(&self, expected: &str) -> Refusal {
        let found = match self.value.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a fraction",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.refuse(
            ErrorId::ConfigSyntax,
            format!("this is {found}; write {expected}"),
        )
    }
}

impl Clone for Value<'_> {
    fn clone(&self) -> Self {
        Value {
            doc: self.doc,
            value: self.value,
            name: self.name.clone(),
        }
    }
}

/// A value that may be the same on all nodes.
pub(super) enum PerNode<'t> {
    All(Value<'t>),
    Each(Vec<NodeValue<'t>>),
}

/// One node's part of a [`PerNode`].
pub(super) struct NodeValue<'t> {
    pub node: &'t str,
    pub node_at: usize,
    pub value: Value<'t>,
}

fn unknown_key(doc: Document<'_>, key: &str, at: usize, table: &str, known: &[&str]) -> Refusal {
    if RESERVED.contains(&key) {
        return doc.refuse(
            at,
            ErrorId::ConfigReserved,
            format!("`{key}` is not supported yet; remove it"),
        );
    }
    if table == TOP && RESERVED_TABLES.contains(&key) {
        return doc.refuse(
            at,
            ErrorId::ConfigReserved,
            format!("[[{key}]] is not supported yet; remove the table"),
        );
    }
    let remedy = match known.iter().find(|candidate| similar(key, candidate)) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("known keys are {}", known.join(", ")),
    };
    let key = excerpt(key);
    doc.refuse(
        at,
        ErrorId::ConfigSyntax,
        format!("unknown key `{key}` in {table}; {remedy}"),
    )
}

/// What the root of the document is called in messages.
pub(super) const TOP: &str = "the file";

/// Whether two keys differ by underscores for dashes, or by one letter added, lost, changed or
/// swapped with its neighbour.
fn similar(written: &str, known: &str) -> bool {
    let written: Vec<char> = written
        .to_lowercase()
        .replace('_', "-")
        .chars()
        .take(64)
        .collect();
    let known: Vec<char> = known.chars().collect();
    let same_front = written
        .iter()
        .zip(&known)
        .take_while(|(a, b)| a == b)
        .count();
    let (a, b) = (&written[same_front..], &known[same_front..]);
    let rest = |text: &[char], from: usize| text.get(from..).unwrap_or_default().to_vec();
    a.is_empty() && b.len() <= 1
        || b.is_empty() && a.len() <= 1
        || rest(a, 1) == rest(b, 1)
        || rest(a, 1) == b
        || a == rest(b, 1)
        || a.len() > 1 && b.len() > 1 && a[0] == b[1] && a[1] == b[0] && a[2..] == b[2..]
}

fn one_line(message: &str) -> String {
    message
        .lines()
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(", ")
}
