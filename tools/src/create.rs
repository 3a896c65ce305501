//! `kagami create`: make this node's disk a replica of a mirror.

use crate::consent::Consent;
use crate::contents::{Identity, Prober};
use crate::context::Context;
use crate::human;
use crate::loss;
use crate::options::Place;
use crate::output;
use crate::overwrite::{Holding, Permissions};
use crate::store::{Access, Store, metadata_place};
use clap::Args;
use mirror_core::config::{Config, Metadata, Mirror, Side, parse_size};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::meta::{self, Layout, LayoutError, NewReplica, SLOTS};
use mirror_core::types::ReplicaId;
use std::path::Path;

/// Make this node's disk a replica of a mirror.
///
/// Writes fresh metadata for this node's disk. The data on the disk stays as it is, but for the
/// tail that internal metadata takes; both copies count as unknown until
/// `kagami primary --initial` on one node says whose data is to be kept.
///
/// A disk that holds something is refused: a file system, a partition table, a member of LVM or
/// RAID, an encrypted volume, swap, another mirror's metadata. The refusal names the option that
/// gives it up. A disk that is mounted or otherwise in use is refused whatever the options. What
/// has no signature, like a database on the bare disk, is not recognised.
///
/// Needs no daemon, and refuses while one holds the disk; needs `wipefs` of util-linux.
#[derive(Args, Debug, Default)]
#[command(after_help = "Examples:
  kagami create r0                     on both nodes, once
  kagami create r0 --size 1GiB         also make the disk, a sparse file, if it is missing
  kagami create r0 --overwrite ext4    give up the ext4 file system on the disk, or mirror it
  kagami create r0 --overwrite gpt,swap
  kagami create r0 --force             forget this replica's metadata and history, after a question
  kagami create r0 --force --yes       without one
  kagami create r0 --overwrite kagami  forget metadata that is damaged or another mirror's")]
pub struct CreateArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// Make the disk, a sparse file of this size, if it is missing.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,

    /// Give up what the disk holds, by its name: as in the refusal, and in `wipefs` and `lsblk --fs`.
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    pub overwrite: Vec<String>,

    /// Replace this replica's own metadata: this copy then counts as unknown.
    #[arg(long)]
    pub force: bool,

    /// Before history is forgotten.
    #[command(flatten)]
    pub consent: Consent,
}

impl CreateArgs {
    fn permissions(&self) -> Permissions<'_> {
        Permissions {
            by_name: &self.overwrite,
            own_metadata: self.force,
        }
    }
}

/// Runs the verb.
pub fn run(place: &Place, args: &CreateArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    let side = context.side(mirror);
    let created = create(&context.config, mirror, side, args)?;
    let layout = created.layout;
    let room = match &side.metadata {
        Metadata::Internal => format!(
            "its metadata takes the tail, from byte {}: a file system on it must be no larger",
            layout.data_size
        ),
        Metadata::External(path) => format!("its metadata is in {}", path.display()),
    };
    output::line(format!(
        "{}: {} is a new replica with {} ({} bytes) for data; {room}",
        mirror.name,
        side.disk.display(),
        human::size(layout.data_size),
        layout.data_size
    ));
    if !created.kept.is_empty() {
        output::line(format!(
            "note: {} stays in the data, until a sync from the peer replaces it",
            created.kept.join(", ")
        ));
    }
    output::line(format!(
        "next: the same on the other node, then `kagami primary {} --initial` on the one whose \
         data is to be kept",
        mirror.name
    ));
    Ok(())
}

/// A new replica.
#[derive(Debug)]
pub struct Created {
    /// How it is laid out.
    pub layout: Layout,
    /// What else is in its data, in words.
    pub kept: Vec<String>,
}

/// Makes `side`'s disk a replica. Until all that it holds is given up, nothing is written to it.
pub fn create(
    config: &Config,
    mirror: &Mirror,
    side: &Side,
    args: &CreateArgs,
) -> Result<Created, Refusal> {
    let data = open_data(&side.disk, args.size)?;
    let layout = layout_of(&data, side)?;
    let external = match &side.metadata {
        Metadata::External(path) if path.exists() => {
            Some(open_external(path, layout.external_size())?)
        }
        Metadata::Internal | Metadata::External(_) => None,
    };
    let identity = Identity::of(config, mirror, side);
    let held = all_held(&data, external.as_ref(), identity)?;
    args.permissions().cover(&held)?;
    let histories = held.iter().filter_map(Holding::history);
    for loss in histories.filter_map(loss::of_recreating) {
        args.consent.obtain(&loss)?;
    }

    let external = match (&side.metadata, external) {
        (Metadata::External(path), None) => Some(Store::create(path, layout.external_size())?),
        (_, external) => external,
    };
    let kept = clear_surroundings(&held, &data, external.as_ref(), layout.data_size)?;
    let new = NewReplica {
        replica: random_id()?,
        cluster: config.cluster.clone(),
        mirror: mirror.name.clone(),
        node: side.node.clone(),
    };
    write_image(external.as_ref().unwrap_or(&data), &layout, &new)?;
    Ok(Created { layout, kept })
}

fn layout_of(data: &Store, side: &Side) -> Result<Layout, Refusal> {
    Layout::new(data.size, metadata_place(side)).map_err(|error| {
        let (id, remedy) = match error {
            LayoutError::TooSmall(_) => (ErrorId::StoreTooSmall, "use a larger disk"),
            LayoutError::TooLarge(_) => (ErrorId::StoreUnsupported, "use a smaller disk"),
        };
        let disk = side.disk.display();
        Refusal::new(id, format!("{disk}: {error}; {remedy}"))
    })
}

/// What is on the whole of a replica's store, which nobody uses.
fn all_held(
    data: &Store,
    external: Option<&Store>,
    identity: Identity<'_>,
) -> Result<Vec<Holding>, Refusal> {
    let prober = Prober::of_system();
    let mut held = Vec::new();
    for store in [Some(data), external].into_iter().flatten() {
        store.refuse_occupied()?;
        held.extend(Holding::all_of(store, &prober, identity)?);
    }
    Ok(held)
}

/// Erases the signatures that were given up outside the mirror's data, and says which stay inside.
///
/// Where the metadata is, they would be found ever after: a RAID's at the tail would be assembled by
/// the kernel at the next start of the machine. In the data they go with the data.
fn clear_surroundings(
    held: &[Holding],
    data: &Store,
    external: Option<&Store>,
    data_size: u64,
) -> Result<Vec<String>, Refusal> {
    let mut kept = Vec::new();
    for holding in held {
        let Some(signature) = holding.signature() else {
            continue;
        };
        let store = match external {
            Some(external) if holding.is_on(external) => external,
            _ if signature.offset < data_size => {
                kept.push(signature.to_string());
                continue;
            }
            _ => data,
        };
        store.write(signature.offset, &vec![0; signature.len as usize])?;
        store.sync()?;
    }
    kept.dedup();
    Ok(kept)
}

fn open_data(path: &Path, size: Option<u64>) -> Result<Store, Refusal> {
    match size {
        Some(size) if !path.exists() => Store::create(path, size),
        Some(size) => {
            let store = Store::open(path, Access::Write)?;
            if store.size == size {
                return Ok(store);
            }
            Err(Refusal::new(
                ErrorId::UsageConflict,
                format!(
                    "{} exists with {} bytes, not {size}; leave --size away to use it as it is",
                    path.display(),
                    store.size
                ),
            ))
        }
        None => Store::open(path, Access::Write).map_err(|mut refusal| {
            if !path.exists() {
                refusal.message += ", or pass --size to make a sparse file";
            }
            refusal
        }),
    }
}

fn open_external(path: &Path, needed: u64) -> Result<Store, Refusal> {
    let store = Store::open(path, Access::Write)?;
    if store.size >= needed {
        return Ok(store);
    }
    Err(Refusal::new(
        ErrorId::StoreTooSmall,
        format!(
            "{} has {} bytes, the metadata needs {needed}; use a larger one, or remove the file",
            path.display(),
            store.size
        ),
    ))
}

/// The slots are erased before anything else and written after everything else, each durably, so
/// that a crash in between leaves no replica rather than half a one.
fn write_image(store: &Store, layout: &Layout, new: &NewReplica) -> Result<(), Refusal> {
    let slots: Vec<u64> = (0..SLOTS).map(|slot| layout.slot_offset(slot)).collect();
    let mut in_slots = false;
    for (offset, bytes) in meta::create(layout, new) {
        if slots.contains(&offset) != in_slots {
            store.sync()?;
            in_slots = !in_slots;
        }
        store.write(offset, &bytes)?;
    }
    store.sync()
}

fn random_id() -> Result<ReplicaId, Refusal> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        Refusal::new(
            ErrorId::Internal,
            format!("no random numbers from the kernel: {error}"),
        )
    })?;
    Ok(ReplicaId(u128::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump;
    use std::fs;
    use tempfile::TempDir;

    fn config(dir: &Path, metadata: &str) -> Config {
        let dir = dir.display();
        let text = format!(
            r#"
[cluster]
name = "c"
insecure = true
[[node]]
name = "a"
addresses = ["127.0.0.1"]
[[node]]
name = "b"
addresses = ["127.0.0.2"]
[[mirror]]
name = "r0"
port = 7790
disk = {{ a = "{dir}/a.img", b = "{dir}/b.img" }}
metadata = "{metadata}"
"#
        );
        Config::parse(&text, Path::new("k")).unwrap()
    }

    fn sized(size: u64) -> CreateArgs {
        CreateArgs {
            size: Some(size),
            ..CreateArgs::default()
        }
    }

    fn forced() -> CreateArgs {
        CreateArgs {
            force: true,
            ..CreateArgs::default()
        }
    }

    fn create_a(config: &Config, args: &CreateArgs) -> Result<Layout, Refusal> {
        let mirror = &config.mirrors[0];
        Ok(create(config, mirror, &mirror.sides[0], args)?.layout)
    }

    #[test]
    fn internal_metadata_takes_the_tail_only() {
        let dir = TempDir::new().unwrap();
        let config = config(dir.path(), "internal");
        let disk = dir.path().join("a.img");
        fs::write(&disk, vec![0x5a; 8 << 20]).unwrap();
        let layout = create_a(&config, &CreateArgs::default()).unwrap();
        let after = fs::read(&disk).unwrap();
        assert_eq!(after.len(), 8 << 20);
        assert!(
            after[..layout.data_size as usize]
                .iter()
                .all(|&byte| byte == 0x5a)
        );

        let refusal = create_a(&config, &CreateArgs::default()).unwrap_err();
        assert_eq!(refusal.id, ErrorId::MetadataPresent);
        assert!(
            refusal.message.contains("mirror `r0` on node `a`"),
            "{refusal}"
        );
        let first = dump::describe(&config.mirrors[0].sides[0]).unwrap();
        create_a(&config, &forced()).unwrap();
        let second = dump::describe(&config.mirrors[0].sides[0]).unwrap();
        assert_ne!(first.replica, second.replica);
    }

    #[test]
    fn a_missing_disk_is_made_only_on_demand() {
        let dir = TempDir::new().unwrap();
        let config = config(dir.path(), "internal");
        let refusal = create_a(&config, &CreateArgs::default()).unwrap_err();
        assert_eq!(refusal.id, ErrorId::StoreUnavailable);
        assert!(refusal.message.contains("--size"), "{refusal}");
        create_a(&config, &sized(16 << 20)).unwrap();
        assert_eq!(
            fs::metadata(dir.path().join("a.img")).unwrap().len(),
            16 << 20
        );
        let refusal = create_a(&config, &sized(8 << 20)).unwrap_err();
        assert_eq!(refusal.id, ErrorId::UsageConflict);
    }

    #[test]
    fn external_metadata_is_made() {
        let dir = TempDir::new().unwrap();
        let meta = dir.path().join("meta");
        let config = config(dir.path(), meta.to_str().unwrap());
        let layout = create_a(&config, &sized(16 << 20)).unwrap();
        assert_eq!(layout.data_size, 16 << 20);
        assert_eq!(fs::metadata(&meta).unwrap().len(), layout.external_size());
        assert_eq!(
            create_a(&config, &CreateArgs::default()).unwrap_err().id,
            ErrorId::MetadataPresent
        );
        fs::write(&meta, b"short").unwrap();
        assert_eq!(
            create_a(&config, &forced()).unwrap_err().id,
            ErrorId::StoreTooSmall
        );
    }

    #[test]
    fn too_small_a_disk() {
        let dir = TempDir::new().unwrap();
        let config = config(dir.path(), "internal");
        let refusal = create_a(&config, &sized(4096)).unwrap_err();
        assert_eq!(refusal.id, ErrorId::StoreTooSmall);
    }
}
