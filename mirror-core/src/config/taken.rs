//! Names, ports and paths that only one part of a configuration can have.

use super::document::Document;
use crate::error::{ErrorId, Refusal};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};

/// What only one thing can have, and where the file gives it away.
pub(super) struct Taken<'t> {
    doc: Document<'t>,
    claims: HashMap<Claim, usize>,
}

/// Something to be had once.
#[derive(PartialEq, Eq, Hash)]
pub(super) enum Claim {
    Node(String),
    Mirror(String),
    Listen(SocketAddr),
    Nbd(String, SocketAddr),
    Path(String, PathBuf),
}

impl<'t> Taken<'t> {
    pub fn new(doc: Document<'t>) -> Taken<'t> {
        Taken {
            doc,
            claims: HashMap::new(),
        }
    }

    pub fn claim(
        &mut self,
        claim: Claim,
        at: usize,
        complaint: impl FnOnce() -> String,
    ) -> Result<(), Refusal> {
        let Some(earlier) = self.claims.insert(claim, at) else {
            return Ok(());
        };
        let line = self.doc.line(earlier);
        let message = format!("{}, first on line {line}; choose another", complaint());
        Err(self.doc.refuse(at, ErrorId::ConfigConflict, message))
    }

    pub fn claim_path(&mut self, node: &str, path: &Path, at: usize) -> Result<(), Refusal> {
        // `.` and doubled slashes do not make another file.
        let plain = path
            .components()
            .filter(|part| *part != Component::CurDir)
            .collect();
        self.claim(Claim::Path(node.to_owned(), plain), at, || {
            format!("{} is used twice on node `{node}`", path.display())
        })
    }
}
