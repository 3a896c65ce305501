//! `kagami create` on devices that somebody uses: refused with the use and its end, whatever the
//! options, and not changed.

use kagami_tests::{MIB, Tool, binary, require_root};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A block device made of a file; gone with its value.
struct LoopDevice(PathBuf);

impl LoopDevice {
    #[track_caller]
    fn new(file: &Path, options: &[&str]) -> LoopDevice {
        require_root("a loop device");
        let tool = Tool::new("losetup")
            .args(["--find", "--show"])
            .args(options);
        LoopDevice(PathBuf::from(tool.arg(file).success().trim()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Tool::new("losetup").arg("--detach").arg(&self.0).output();
    }
}

/// The first partition of a device, of which only the kernel is told: sectors 2048 to 67583. It would
/// outlive the device, so it goes with its value.
struct Partition<'a>(&'a LoopDevice);

impl Partition<'_> {
    #[track_caller]
    fn new(device: &LoopDevice) -> Partition<'_> {
        // One that a killed run left is in the way.
        forget_partition(device);
        let tool = Tool::new("addpart").arg(&device.0);
        tool.args(["1", "2048", "65536"]).success();
        Partition(device)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("{}p1", self.0.0.display()))
    }
}

impl Drop for Partition<'_> {
    fn drop(&mut self) {
        forget_partition(self.0);
    }
}

fn forget_partition(device: &LoopDevice) {
    let _ = Tool::new("delpart").arg(&device.0).arg("1").output();
}

/// A mounted file system; unmounted with its value.
struct Mount(PathBuf);

impl Mount {
    #[track_caller]
    fn new(device: &Path, at: PathBuf) -> Mount {
        fs::create_dir_all(&at).unwrap();
        Tool::new("mount").arg(device).arg(&at).success();
        Mount(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Tool::new("umount").arg(&self.0).output();
    }
}

struct Scene {
    dir: TempDir,
}

impl Scene {
    /// A file of 64 MiB.
    fn new() -> Scene {
        let scene = Scene {
            dir: TempDir::new().unwrap(),
        };
        let file = File::create(scene.file()).unwrap();
        file.set_len(64 * MIB).unwrap();
        scene
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    fn mount_point(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// `kagami create` on this disk: its exit code and what it says.
    fn create(&self, disk: &Path, options: &[&str]) -> (i32, String) {
        let config = self.dir.path().join("kagami.toml");
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
disk = {{ a = "{}", b = "/nonexistent" }}
"#,
            disk.display()
        );
        fs::write(&config, text).unwrap();
        let output = Command::new(binary("kagami"))
            .arg("--config")
            .arg(config)
            .args(["--node", "a", "create", "r0"])
            .args(options)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap_or(-1), said)
    }

    /// Requires a refusal that no option changes, with these words.
    #[track_caller]
    fn refused(&self, disk: &Path, id: &str, parts: &[&str]) {
        let code = if id == "KGM-0202" { 4 } else { 1 };
        for options in [
            &[][..],
            &["--force", "--yes", "--overwrite", "ext4,gpt,partitions"],
        ] {
            let (ended, said) = self.create(disk, options);
            assert_eq!(ended, code, "{said}");
            assert!(said.starts_with(&format!("kagami: {id}: ")), "{said}");
            assert_eq!(said.lines().count(), 1, "{said}");
            for part in parts {
                assert!(said.contains(part), "{part:?} is not in {said}");
            }
        }
    }
}

#[test]
fn a_mounted_device_and_the_file_under_it() {
    let scene = Scene::new();
    Tool::new("mkfs.ext4").arg("-q").arg(scene.file()).success();
    let device = LoopDevice::new(&scene.file(), &[]);
    let name = device.0.to_str().unwrap();
    let at = scene.mount_point();
    let at_text = at.display().to_string();
    let mount = Mount::new(&device.0, at);
    fs::write(mount.0.join("precious"), b"kept").unwrap();
    scene.refused(
        &device.0,
        "KGM-0202",
        &["is mounted at", &at_text, "umount"],
    );
    scene.refused(
        &scene.file(),
        "KGM-0202",
        &[name, "is mounted at", "losetup -d"],
    );
    assert_eq!(fs::read(mount.0.join("precious")).unwrap(), b"kept");
    drop(mount);
    Tool::new("fsck.ext4")
        .args(["-f", "-n"])
        .arg(&device.0)
        .success();

    // Not mounted, it is a file system like another; the file under the device is still in use.
    scene.refused(&scene.file(), "KGM-0202", &[name, "losetup -d"]);
    let (code, said) = scene.create(&device.0, &[]);
    assert_eq!(code, 4, "{said}");
    assert!(
        said.contains("KGM-0210") && said.ends_with("pass --overwrite ext4\n"),
        "{said}"
    );
    let (code, said) = scene.create(&device.0, &["--overwrite", "ext4"]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn a_disk_with_a_mounted_partition() {
    let scene = Scene::new();
    let device = LoopDevice::new(&scene.file(), &[]);
    let partition = Partition::new(&device);
    let path = partition.path();
    Tool::new("mkfs.ext4").arg("-q").arg(&path).success();
    let mount = Mount::new(&path, scene.mount_point());
    let name = path.file_name().unwrap().to_str().unwrap();
    scene.refused(&device.0, "KGM-0202", &[name, "is mounted at"]);
    drop(mount);
    let (code, said) = scene.create(&device.0, &[]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains(&format!("partitions ({name})")), "{said}");
    assert!(said.ends_with("pass --overwrite partitions\n"), "{said}");
}

#[test]
fn a_device_that_cannot_be_written() {
    let scene = Scene::new();
    let device = LoopDevice::new(&scene.file(), &["--read-only"]);
    scene.refused(&device.0, "KGM-0212", &["is read-only", "blockdev --setrw"]);
}
