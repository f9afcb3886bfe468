package trailvec

import java.lang.{Boolean => JavaBoolean}
import java.nio.charset.StandardCharsets.UTF_8
import java.nio.file.{FileAlreadyExistsException, Files, FileSystemException, Paths}
import java.nio.file.attribute.PosixFilePermissions
import java.util.{Iterator => JavaIterator, UUID}

import scala.collection.JavaConverters._

import io.delta.storage.HDFSLogStore
import org.apache.hadoop.conf.Configuration
import org.apache.hadoop.fs.Path
import org.apache.hadoop.fs.permission.FsPermission

/** Delta's commits on a local disk, safe for any number of processes: a version's file is written beside its place and
  * linked there, which the operating system refuses where there is one.
  *
  * Delta's own store looks whether there is a file and then renames over it, under a lock of its own process: between the
  * two another process may commit the same version, and its rows are silently gone.
  */
class LinkLogStore(initial: Configuration) extends HDFSLogStore(initial) {
  override def write(path: Path, actions: JavaIterator[String], overwrite: JavaBoolean, conf: Configuration): Unit = {
    val lines = actions.asScala.toSeq
    if (overwrite || !link(path, lines, conf)) super.write(path, lines.iterator.asJava, overwrite, conf)
  }

  /** False if the file system has no links. */
  private def link(path: Path, lines: Seq[String], conf: Configuration): Boolean = {
    val place = Paths.get(path.toUri)
    val written = place.resolveSibling(s".${place.getFileName}.${UUID.randomUUID}.tmp")
    // As Hadoop gives all of a table's other files, whatever the process's own mask.
    val mode = FsPermission.getFileDefault.applyUMask(FsPermission.getUMask(conf)).toString
    try {
      Files.write(written, lines.map(_ + "\n").mkString.getBytes(UTF_8))
      Files.setPosixFilePermissions(written, PosixFilePermissions.fromString(mode))
      Files.createLink(place, written)
      true
    } catch {
      // A network's disk may have lost the answer to the first try.
      case taken: FileAlreadyExistsException => if (Files.isSameFile(place, written)) true else throw taken
      case _: FileSystemException | _: UnsupportedOperationException => false
    } finally Files.deleteIfExists(written)
  }
}
