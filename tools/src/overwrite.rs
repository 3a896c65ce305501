//! Leave to overwrite: what a disk holds on one side, what the operator has given up on the other.
//!
//! Everything is given up by its own name, so that a word on the command line that was meant for
//! one disk does not empty another. Only a replica's own metadata has an option without a name,
//! `--force`.

use crate::contents::{self, Identity, Metadata, Prober, Signature};
use crate::store::Store;
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::meta::superblock::Superblock;
use std::fmt;
use std::path::{Path, PathBuf};

/// What Kagami metadata that is not this replica's own is called on the command line.
const KAGAMI: &str = "kagami";

/// What partitions without a partition table are called.
const PARTITIONS: &str = "partitions";

/// The boot sector that goes with a GPT.
const PROTECTIVE_MBR: &str = "PMBR";

/// One thing on a store that nobody may lose unasked.
#[derive(Debug)]
pub struct Holding {
    path: PathBuf,
    what: What,
}

#[derive(Debug)]
enum What {
    Metadata(Metadata),
    Signature(Signature),
    Partitions(Vec<String>),
}

impl Holding {
    /// All that a store holds.
    pub fn all_of(
        store: &Store,
        prober: &Prober,
        identity: Identity<'_>,
    ) -> Result<Vec<Holding>, Refusal> {
        let metadata = contents::metadata(store, identity)?;
        let signatures = prober.signatures(store)?;
        let partitions = store.partitions();
        let mut all: Vec<What> = metadata.map(What::Metadata).into_iter().collect();
        all.extend(signatures.into_iter().map(What::Signature));
        if !partitions.is_empty() {
            all.push(What::Partitions(partitions));
        }
        let path = store.path();
        let held = all.into_iter().map(|what| Holding {
            path: path.to_owned(),
            what,
        });
        Ok(held.collect())
    }

    /// Whether it is on this store.
    pub fn is_on(&self, store: &Store) -> bool {
        self.path == store.path()
    }

    /// The replica whose history it is.
    pub fn history(&self) -> Option<&Superblock> {
        match &self.what {
            What::Metadata(Metadata::Own(superblock)) => Some(superblock),
            _ => None,
        }
    }

    /// The signature that it is.
    pub fn signature(&self) -> Option<&Signature> {
        match &self.what {
            What::Signature(signature) => Some(signature),
            _ => None,
        }
    }

    /// Its name behind `--overwrite`; a replica's own metadata has none.
    fn name(&self) -> Option<&str> {
        match &self.what {
            What::Metadata(Metadata::Own(_)) => None,
            What::Metadata(_) => Some(KAGAMI),
            What::Signature(signature) => Some(&signature.name),
            What::Partitions(_) => Some(PARTITIONS),
        }
    }

    fn error(&self) -> ErrorId {
        match &self.what {
            What::Metadata(Metadata::Own(_)) => ErrorId::MetadataPresent,
            What::Metadata(Metadata::Damaged(_)) => ErrorId::MetadataDamaged,
            What::Metadata(Metadata::Foreign(_)) => ErrorId::MetadataForeign,
            What::Metadata(Metadata::Version(_)) => ErrorId::MetadataVersion,
            What::Signature(_) | What::Partitions(_) => ErrorId::StoreNotEmpty,
        }
    }
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Metadata(Metadata::Own(own)) => write!(
                f,
                "Kagami metadata of this replica (mirror `{}` on node `{}`)",
                own.mirror_name, own.node
            ),
            What::Metadata(Metadata::Damaged(error)) => {
                write!(f, "Kagami metadata that does not verify ({error})")
            }
            What::Metadata(Metadata::Foreign(of)) => write!(
                f,
                "Kagami metadata of mirror `{}` on node `{}` of cluster `{}`",
                of.mirror_name, of.node, of.cluster
            ),
            What::Metadata(Metadata::Version(version)) => {
                write!(f, "Kagami metadata of another version ({version})")
            }
            What::Signature(signature) => signature.fmt(f),
            What::Partitions(names) => write!(f, "partitions ({})", names.join(", ")),
        }
    }
}

/// What the command line gives up.
#[derive(Clone, Copy, Debug)]
pub struct Permissions<'a> {
    /// What `--overwrite` names.
    pub by_name: &'a [String],
    /// Whether this replica's own metadata may go, by `--force`.
    pub own_metadata: bool,
}

impl Permissions<'_> {
    /// Whether everything that is held may be given up.
    pub fn cover(self, held: &[Holding]) -> Result<(), Refusal> {
        let held = without_consequences(held);
        let Some(first) = held.iter().find(|it| !self.covers(it)) else {
            return Ok(());
        };
        let mut places: Vec<(&Path, Vec<String>)> = Vec::new();
        for holding in &held {
            let words = holding.to_string();
            match places.iter_mut().find(|(path, _)| *path == holding.path) {
                Some((_, all)) if all.contains(&words) => {}
                Some((_, all)) => all.push(words),
                None => places.push((&holding.path, vec![words])),
            }
        }
        let places: Vec<String> = places
            .iter()
            .map(|(path, all)| format!("{} holds {}", path.display(), all.join(", ")))
            .collect();
        Err(Refusal::new(
            first.error(),
            format!(
                "{}; nothing was changed: check that this is the right disk, and to go on pass {}",
                places.join("; "),
                options_for(&held)
            ),
        ))
    }

    fn covers(self, holding: &Holding) -> bool {
        match holding.name() {
            None => self.own_metadata,
            Some(name) => self.by_name.iter().any(|it| it.eq_ignore_ascii_case(name)),
        }
    }
}

/// Whoever gives up a partition table gives up what comes with it.
fn without_consequences(held: &[Holding]) -> Vec<&Holding> {
    let on = |path: &Path, is: fn(&Signature) -> bool| {
        let mut all = held.iter().filter(|it| it.path == path);
        all.any(|it| it.signature().is_some_and(is))
    };
    let mut rest: Vec<&Holding> = held.iter().collect();
    rest.retain(|holding| match &holding.what {
        What::Signature(signature) if signature.name == PROTECTIVE_MBR => {
            !on(&holding.path, |it| it.name == "gpt")
        }
        What::Partitions(_) => !on(&holding.path, |it| {
            it.usage == contents::Usage::PartitionTable
        }),
        _ => true,
    });
    rest
}

/// The options that give all of it up.
fn options_for(held: &[&Holding]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in held.iter().filter_map(|it| it.name()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let force = held.iter().any(|it| it.name().is_none());
    let force = force.then(|| "--force".to_owned());
    let overwrite = (!names.is_empty()).then(|| format!("--overwrite {}", names.join(",")));
    let options: Vec<String> = [force, overwrite].into_iter().flatten().collect();
    options.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contents::Usage;
    use mirror_core::meta::superblock::SlotError;
    use mirror_core::types::ReplicaId;

    fn on(path: &str, what: What) -> Holding {
        Holding {
            path: path.into(),
            what,
        }
    }

    fn signature(name: &str) -> What {
        let usage = match name {
            "gpt" | PROTECTIVE_MBR | "dos" => Usage::PartitionTable,
            "swap" => Usage::Other,
            _ => Usage::FileSystem,
        };
        What::Signature(Signature {
            name: name.to_owned(),
            usage,
            label: None,
            offset: 0,
            len: 2,
        })
    }

    fn own() -> What {
        let superblock = Superblock::unborn(ReplicaId(1), 1 << 20);
        What::Metadata(Metadata::Own(Box::new(superblock)))
    }

    fn damaged() -> What {
        What::Metadata(Metadata::Damaged(SlotError::Checksum))
    }

    fn partitions() -> What {
        What::Partitions(vec!["sdb1".to_owned()])
    }

    /// Rows: what is held, the options that are named, and the error.
    #[test]
    fn the_refusal_names_exactly_the_options_that_help() {
        for (held, options, error) in [
            (
                vec![signature("ext4")],
                "--overwrite ext4",
                ErrorId::StoreNotEmpty,
            ),
            (
                vec![
                    signature("gpt"),
                    signature("gpt"),
                    signature(PROTECTIVE_MBR),
                ],
                "--overwrite gpt",
                ErrorId::StoreNotEmpty,
            ),
            (
                vec![signature(PROTECTIVE_MBR)],
                "--overwrite PMBR",
                ErrorId::StoreNotEmpty,
            ),
            (
                vec![signature("dos"), partitions()],
                "--overwrite dos",
                ErrorId::StoreNotEmpty,
            ),
            (
                vec![partitions()],
                "--overwrite partitions",
                ErrorId::StoreNotEmpty,
            ),
            (
                vec![signature("ext4"), signature("swap")],
                "--overwrite ext4,swap",
                ErrorId::StoreNotEmpty,
            ),
            (vec![own()], "--force", ErrorId::MetadataPresent),
            (
                vec![own(), signature("ext4")],
                "--force --overwrite ext4",
                ErrorId::MetadataPresent,
            ),
            (
                vec![damaged()],
                "--overwrite kagami",
                ErrorId::MetadataDamaged,
            ),
            (
                vec![damaged(), signature("xfs")],
                "--overwrite kagami,xfs",
                ErrorId::MetadataDamaged,
            ),
        ] {
            let held: Vec<Holding> = held.into_iter().map(|it| on("/d", it)).collect();
            let nothing = Permissions {
                by_name: &[],
                own_metadata: false,
            };
            let refusal = nothing.cover(&held).unwrap_err();
            assert_eq!(refusal.id, error, "{refusal}");
            assert!(refusal.message.starts_with("/d holds "), "{refusal}");
            assert!(
                refusal.message.ends_with(&format!("pass {options}")),
                "{refusal}"
            );
            // With these, and with no fewer of them.
            let names: Vec<String> = match options.split_once("--overwrite ") {
                Some((_, names)) => names.to_uppercase().split(',').map(str::to_owned).collect(),
                None => Vec::new(),
            };
            let own_metadata = options.contains("--force");
            let given = Permissions {
                by_name: &names,
                own_metadata,
            };
            assert_eq!(given.cover(&held), Ok(()), "{options}");
            if let [_, fewer @ ..] = &names[..] {
                assert!(
                    Permissions {
                        by_name: fewer,
                        own_metadata
                    }
                    .cover(&held)
                    .is_err()
                );
            }
            assert_eq!(
                Permissions {
                    own_metadata: false,
                    ..given
                }
                .cover(&held)
                .is_err(),
                own_metadata
            );
        }
    }

    #[test]
    fn both_stores_are_told_of() {
        let held = [on("/d", signature("ext4")), on("/m", signature("swap"))];
        let named = ["ext4".to_owned()];
        let refusal = Permissions {
            by_name: &named,
            own_metadata: true,
        }
        .cover(&held)
        .unwrap_err();
        assert!(
            refusal.message.starts_with(
                "/d holds a file system (ext4); /m holds a signature (swap); nothing was changed"
            ),
            "{refusal}"
        );
        assert!(
            refusal.message.ends_with("pass --overwrite ext4,swap"),
            "{refusal}"
        );
    }
}
